"""What this installation can do, and why not more: the facts behind ``omnimoe doctor``."""

from __future__ import annotations

import dataclasses
import os
import platform
from typing import Any

import torch

from omnimoe.installation import PACKAGES, attention, extras, misfits, version_of, weights_cache
from omnimoe.ops import BACKENDS
from omnimoe.ops._extension import Extension, cache_folder, extension
from omnimoe.ops.experts_mlp import KERNELS_FIRST as ROUTED
from omnimoe.ops.grouped_mm import IMPLEMENTATIONS as GROUPED
from omnimoe.ops.grouped_mm import KERNELS_FIRST as GROUPED_PLAIN
from omnimoe.ops.linear import KERNELS_FIRST as LINEAR_PLAIN
from omnimoe.ops.selective_scan import IMPLEMENTATIONS as SCANS
from omnimoe.plugins import load_plugins

DTYPES = ("float32", "bfloat16", "float16", "float64")


def examine() -> dict[str, Any]:
    """Versions and what does not fit, devices, kernels, which backend each op takes for each device and dtype, extras,
    plugins, and where weights lie.

    Returns:
        JSON's own types. The kernels are built first, if they can be and were not.
    """
    devices = ["cpu", *([f"cuda: {torch.cuda.get_device_name()}"] if torch.cuda.is_available() else [])]
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "misfits": misfits(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu kernels": _kernels(extension()),
        "cuda kernels": _kernels(extension("cuda")),
        "backends": dict(BACKENDS),
        "other libraries": _foreign("cuda" if torch.cuda.is_available() else "cpu"),
        "asked for": os.environ.get("OMNIMOE_BACKEND") or None,
        "ops": [_choice(op, order, device, dtype) for op, order in _ORDERS.items() for device in ("cpu", "cuda")
                for dtype in DTYPES if device == "cpu" or (torch.cuda.is_available() and "no_grad" not in op)],
        "attention": attention(),
        "extras": extras(),
        "plugins": [dataclasses.asdict(plugin) for plugin in load_plugins(again=True)],
        "weights": weights_cache(),
    }  # fmt: skip


_ORDERS = {
    "grouped_mm": GROUPED,
    "grouped_mm, no_grad": GROUPED_PLAIN,
    "linear, no_grad": LINEAR_PLAIN,
    "experts_mlp, routed": ROUTED,
    "selective_scan": SCANS,
}


def _kernels(found: Extension) -> dict[str, str | None]:
    return {
        "library": str(found.path) if found.path else None,
        "instructions": found.instructions or None,
        "why not": found.reason or None,
        "folder": str(cache_folder()),
    }


def _choice(op: str, order: Any, device: str, dtype: str) -> dict[str, Any]:
    operands = _operands(op, device, dtype)
    own = [implementation for implementation in order if not implementation.is_foreign]
    reasons = {implementation.backend: implementation.why_not(*operands) for implementation in own}
    able = [name for name, reason in reasons.items() if not reason]
    return {
        "op": op, "device": device, "dtype": dtype, "backend": able[0],
        "passed over": {name: reason for name, reason in reasons.items() if reason},
    }  # fmt: skip


def _foreign(device: str) -> dict[str, dict[str, str]]:
    """Backends that are other libraries', by op: why not, or an empty string. They run only when asked for."""
    found: dict[str, dict[str, str]] = {}
    for op, order in _ORDERS.items():
        for implementation in () if "no_grad" in op else order:
            if implementation.is_foreign:
                reason = implementation.why_not(*_operands(op, device, "bfloat16"))
                found.setdefault(implementation.backend, {})[op] = reason
    return found


def _operands(op: str, device: str, dtype: str) -> tuple[Any, ...]:
    x = torch.empty(4, 16, dtype=getattr(torch, dtype), device=device)
    into, down = x.new_empty(2, 32, 16), x.new_empty(2, 16, 16)
    offsets = torch.zeros(2, dtype=torch.int32, device=device)
    rows = torch.zeros(4, dtype=torch.int64, device=device)
    if op == "selective_scan":  # which takes float32 from all narrower dtypes
        wide = torch.empty(1, 4, 16, device=device)
        return wide, wide, wide[0], wide, wide, None, None
    if op.startswith("linear"):
        return x, down[0], None
    return (x, down, offsets, None) if op.startswith("grouped_mm") else (x, into, down, offsets, rows, None)
