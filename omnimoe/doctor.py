"""What this installation can do, and why not more: the facts behind ``omnimoe doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from omnimoe.ops import BACKENDS
from omnimoe.ops._extension import cache_folder, extension
from omnimoe.ops.experts_mlp import ROUTED
from omnimoe.ops.grouped_mm import IMPLEMENTATIONS as GROUPED

DTYPES = ("float32", "bfloat16", "float16", "float64")
PACKAGES = ("torch", "transformers", "safetensors", "huggingface-hub", "xformers", "megablocks", "triton")


def examine() -> dict[str, Any]:
    """Versions, devices, kernels, and which backend each op takes for each device and dtype.

    Returns:
        JSON's own types. The kernels are built first, if they can be and were not.
    """
    found = extension()
    devices = ["cpu", *([f"cuda: {torch.cuda.get_device_name()}"] if torch.cuda.is_available() else [])]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu kernels": {
            "library": str(found.path) if found.path else None,
            "instructions": found.instructions or None,
            "why not": found.reason or None,
            "folder": str(cache_folder()),
        },
        "backends": dict(BACKENDS),
        "asked for": os.environ.get("OMNIMOE_BACKEND") or None,
        "ops": [_choice(op, order, device, dtype) for op, order in _ORDERS.items() for device in ("cpu", "cuda")
                for dtype in DTYPES if device == "cpu" or torch.cuda.is_available()],
    }  # fmt: skip


_ORDERS = {"grouped_mm": GROUPED, "experts_mlp, routed": ROUTED}


def _choice(op: str, order: Any, device: str, dtype: str) -> dict[str, Any]:
    x = torch.empty(4, 16, dtype=getattr(torch, dtype), device=device)
    weight = torch.empty(2, 16, 16, dtype=x.dtype, device=device)
    offsets = torch.zeros(2, dtype=torch.int32, device=device)
    operands = (x, weight, offsets, None) if op == "grouped_mm" else (x, weight, weight, offsets, None, None)
    reasons = {implementation.backend: implementation.why_not(*operands) for implementation in order}
    able = [name for name, reason in reasons.items() if not reason]
    return {
        "op": op, "device": device, "dtype": dtype, "backend": able[0],
        "passed over": {name: reason for name, reason in reasons.items() if reason},
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
