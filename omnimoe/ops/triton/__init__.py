"""The Triton path: grouped products and the experts' network on any GPU that Triton compiles for, with fixed tiles.

Kernels are read, and Triton is imported, when the first of them is launched.

Not run on a GPU: the kernels compile for compute capabilities 8.0 to 12.0 and were compared with the reference in
Triton's interpreter, on a CPU.
"""

import functools
import importlib.util
import os
from typing import Any

import torch

from omnimoe.ops._library import register

NAMESPACE = "omnimoe_triton"
"""Of the ops, whose schemas and gradients are those of ``omnimoe``."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels multiply."""
CAPABILITY = (8, 0)
"""The least compute capability: older devices have no bfloat16."""
OPS = (
    "grouped_mm", "grouped_wgrad", "route_plan", "gather_rows", "sum_rows", "experts_mlp", "experts_mlp_backward",
)  # fmt: skip


@torch.compiler.assume_constant_result
def missing_triton() -> str:
    """Why there are no Triton kernels; empty where there are."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not is_interpreted():
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        if torch.version.cuda and torch.cuda.get_device_capability() < CAPABILITY:
            return f"the device has compute capability {torch.cuda.get_device_capability()}, the least is {CAPABILITY}"
    register_triton()
    return ""


def is_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` has kernels run on the CPU, slowly, to test them without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(*tensors: Any) -> str:
    """Why the Triton kernels cannot take these tensors; empty where they can."""
    reason = missing_triton()
    for tensor in tensors:
        if reason:
            break
        if tensor is not None and tensor.device.type != ("cpu" if is_interpreted() else "cuda"):
            reason = f"a tensor is on {tensor.device}"
        elif tensor is not None and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            reason = f"it takes {known}, not {tensor.dtype}"
    return reason


@functools.cache
def register_triton() -> torch.library.Library:
    """Defines the ops, once in a process; what they launch is read on first use."""
    library = register(NAMESPACE)
    for name in OPS:
        library.impl(name, functools.partial(_launch, name), "CPU" if is_interpreted() else "CUDA")
    return library


def _launch(name: str, *operands: Any) -> Any:
    from omnimoe.ops.triton import launch

    return getattr(launch, name)(*operands)
