"""``omnimoe doctor``."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints versions, devices, which kernels are used for what, and why not others."""
    from omnimoe.commands._tables import console, plain_table
    from omnimoe.doctor import examine

    found = examine()
    if args.json:
        print(json.dumps(found))
        return 0
    for name, version in found["versions"].items():
        print(f"{name:<16} {version or 'not installed'}")
    print(f"{'devices':<16} {', '.join(found['devices'])}; {found['threads']} threads")
    for title, kernels in (("CPU kernels", found["cpu kernels"]), ("CUDA kernels", found["cuda kernels"])):
        print(f"{title:<16} {kernels['instructions'] or 'none'}: {kernels['library'] or kernels['why not']}")
    if found["asked for"]:
        print(f"{'backend':<16} {found['asked for']}, by OMNIMOE_BACKEND")
    table = plain_table("op", "device", "dtype", "backend", "passed over")
    for row in found["ops"]:
        passed = "; ".join(f"{name}: {reason}" for name, reason in row["passed over"].items())
        table.add_row(row["op"], row["device"], row["dtype"], row["backend"], passed)
    print()
    console().print(table)
    if found["other libraries"]:
        print("\nother libraries' kernels, taken only when asked for")
    for name, reasons in found["other libraries"].items():
        told = "; ".join(f"{op}: {reason or 'can be used'}" for op, reason in reasons.items())
        print(f"{name:<16} {told}")
    return 0
