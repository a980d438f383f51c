"""``omnimoe doctor``."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints versions and what does not fit, devices, kernels and why not others, extras, plugins and the cache.

    Returns:
        1 where packages do not fit together, else 0.
    """
    from omnimoe.commands._tables import console, plain_table
    from omnimoe.doctor import examine

    found = examine()
    if args.json:
        print(json.dumps(found))
        return int(bool(found["misfits"]))
    for name, version in found["versions"].items():
        print(f"{name:<16} {version or 'not installed'}")
    for misfit in found["misfits"]:
        print(f"{'does not fit':<16} {misfit}")
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
    print("\nattention")
    for name, reason in found["attention"].items():
        print(f"{name:<18} {reason or 'can be used'}")
    print("\nextras, pip install 'omnimoe[NAME]'")
    for name, extra in found["extras"].items():
        state = f"missing {', '.join(extra['missing'])}" if extra["missing"] else "installed"
        print(f"{name:<16} {extra['for']}: {state}")
    print("\nplugins")
    for plugin in found["plugins"]:
        print(f"{plugin['name']:<16} {plugin['package'] or plugin['value']}: {plugin['error'] or 'loaded'}")
    if not found["plugins"]:
        print("none; docs/extending.md says how to write one")
    weights = found["weights"]
    print(f"\nweights          {weights['folder']}: {weights['models']} models{', offline' * weights['offline']}")
    return int(bool(found["misfits"]))
