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
    if not torch.cuda.is_available() and not is_interpreted():
        return "there is no CUDA device"
    register_triton()
    return ""


def is_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` has kernels run on the CPU, slowly, to test them without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(*operands: Any) -> str:
    """Why the Triton kernels cannot take these operands; empty where they can."""
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    reason = missing_triton()
    for tensor in tensors:
        if reason:
            break
        if tensor.device.type != _device_type():
            reason = f"a tensor is on {tensor.device}"
        elif tensor.is_floating_point() and tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            reason = f"it takes {known}, not {tensor.dtype}"
        elif tensor.device.type == "cuda":
            reason = _why_not_device(tensor.device.index or 0)
    return reason


@torch.compiler.assume_constant_result
def _device_type() -> str:
    return "cpu" if is_interpreted() else "cuda"


@torch.compiler.assume_constant_result
def _why_not_device(index: int) -> str:
    found = torch.cuda.get_device_capability(index)
    least = ".".join(map(str, CAPABILITY))
    return "" if found >= CAPABILITY else f"device {index} is of compute capability {found[0]}.{found[1]}, not {least}"


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
