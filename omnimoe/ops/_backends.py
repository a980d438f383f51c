"""Which implementation of an op runs: a fixed order for each device, unless one is asked for.

Nothing is timed at run time. An implementation is asked with tensors' metadata alone whether it can, and says why not.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from omnimoe.ops._extension import CUDA_FLOOR, extension
from omnimoe.ops._library import register
from omnimoe.ops.adapters._packages import missing_grouped_gemm, missing_liger, missing_mamba
from omnimoe.ops.triton import missing_triton

BACKENDS = {
    "reference": "plain PyTorch, the definition; any device and dtype, no host synchronisation, much memory",
    "torch": "PyTorch's own products: one a group on a CPU, its grouped product on CUDA",
    "cpp": "compiled kernels for x86-64 with AVX2 or AVX-512",
    "cuda": "compiled kernels for NVIDIA devices of compute capability 8.0 and later",
    "triton": "kernels with fixed tiles for any device that Triton compiles for; not run on a GPU yet",
    "liger": "Liger-Kernel's fused experts, where it is installed; never by itself",
    "megablocks": "MegaBlocks' gather, scatter and grouped product, where it is installed; never by itself; never run",
    "mamba_ssm": "the fused scan of mamba_ssm, for state spaces on CUDA, where it is installed; never run",
}
"""Name to what it is."""


class BackendError(RuntimeError):
    """A backend that was asked for and is unknown, missing, or unable."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        backend: a name of :data:`BACKENDS`.
        call: the function, with the signature of the op.
        why_not: takes the op's operands and gives the reason why it cannot, or an empty string.
        is_foreign: of another library: taken only when it is asked for.
    """

    backend: str
    call: Callable[..., Any]
    why_not: Callable[..., str] = lambda *operands: ""
    is_foreign: bool = False


_asked: list[str] = [os.environ.get("OMNIMOE_BACKEND", "")]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it, every op that has an implementation of this name uses it, and none other.

    Args:
        name: of :data:`BACKENDS`. The environment variable ``OMNIMOE_BACKEND`` does the same for a whole process.

    Raises:
        BackendError: if the name is unknown or the backend is not there; and, from an op within, if it cannot do what
            it is given. It never falls back to another quietly.

    Example:
        >>> import omnimoe
        >>> with omnimoe.backend("reference"):
        ...     y = omnimoe.ops.grouped_mm(torch.ones(1, 2), torch.ones(1, 3, 2), torch.tensor([1], dtype=torch.int32))
    """
    check_backend(name)
    _asked.append(name)
    try:
        yield
    finally:
        _asked.pop()


def asked_backend() -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts that ask for what is asked for now: for what runs later, such as a second forward in backward."""
    return functools.partial(backend, _asked[-1]) if _asked[-1] else nullcontext


def check_backend(name: str) -> None:
    """Raises BackendError if there is no such backend, or it cannot be used here."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    reason = MISSING[name]() if name in MISSING else ""
    if reason:
        raise BackendError(f"backend {name!r} was asked for, but {reason}")


@torch.compiler.assume_constant_result
def missing_kernels() -> str:
    """Why there are no compiled CPU kernels; empty where there are."""
    register()
    return extension().reason


@torch.compiler.assume_constant_result
def missing_cuda_kernels() -> str:
    """Why there are no compiled CUDA kernels; empty where there are."""
    register()
    return extension("cuda").reason


MISSING: dict[str, Callable[[], str]] = {
    "cpp": missing_kernels, "cuda": missing_cuda_kernels, "triton": missing_triton,
    "liger": missing_liger, "megablocks": missing_grouped_gemm,
    "mamba_ssm": missing_mamba,
}  # fmt: skip
"""Backend to why it is not on this machine, or an empty string; those that are not here always are."""


def choose(op: str, implementations: Sequence[Implementation], *operands: Any) -> Callable[..., Any]:
    """The implementation that is asked for, or else the first that can.

    Args:
        op: name of the op, for messages.
        implementations: best first.
        operands: of the op; only metadata is looked at.

    Raises:
        BackendError: if the one that was asked for cannot, or none can.
    """
    asked = _asked[-1]
    if asked:
        check_backend(asked)
        for implementation in implementations:
            if implementation.backend == asked:
                reason = implementation.why_not(*operands)
                if reason:
                    raise BackendError(f"backend {asked!r} was asked for, but its {op} cannot: {reason}")
                return implementation.call
    reasons = []
    for implementation in implementations:
        if implementation.is_foreign:
            continue
        reason = implementation.why_not(*operands)
        if not reason:
            return implementation.call
        reasons.append(f"{implementation.backend}: {reason}")
    raise BackendError(f"no implementation of {op} can: {'; '.join(reasons)}")


def kernels_first(implementations: Sequence[Implementation]) -> tuple[Implementation, ...]:
    """The same implementations, our own kernels before PyTorch's."""
    return tuple(sorted(implementations, key=lambda one: one.backend not in ("cpp", "cuda", "triton")))


FEW_ROWS = 64
"""Up to so many rows a product spends its time on reading the weights, in which our kernels are ahead in any dtype."""


def suits_kernels(x: torch.Tensor, *, is_bank: bool = False) -> bool:
    """Whether large groups are left to our kernels: on a CPU, under ``no_grad``, in float32 or with few rows.

    Where gradients are recorded PyTorch's products are as fast, and equal a plain linear layer to the bit. In bfloat16
    they are ahead for many rows; those of a bank, one for each of its runs, and what belongs to a whole network around
    them, are not, but where the machine multiplies tiles of bfloat16 (AMX), which our kernels do not use.

    Args:
        x: the rows, of which there may be axes in front.
        is_bank: they meet a bank, or a whole network, not one matrix.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if x.dtype == torch.float32 or x.shape[:-1].numel() <= FEW_ROWS:
        return True
    return is_bank and x.dtype == torch.bfloat16 and not has_tiles()


@torch.compiler.assume_constant_result
@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16."""
    return bool(torch.cpu._is_amx_tile_supported())


def why_not_compiled(*tensors: Any) -> str:
    """Why the compiled CPU kernels cannot take these operands; empty where they can."""
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or (tensor.is_cpu and tensor.dtype in _TAKEN):
            continue
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if reason := _why_not_dtype(tensor):
            return reason
    return missing_kernels()


def why_not_cuda(*operands: Any) -> str:
    """Why the compiled CUDA kernels cannot take these operands; empty where they can."""
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device}"
        if reason := _why_not_dtype(tensor):
            return reason
    return missing_cuda_kernels() or (_why_not_device(tensors[0].device.index or 0) if tensors else "")


@torch.compiler.assume_constant_result
def _why_not_device(index: int) -> str:
    found = torch.cuda.get_device_capability(index)
    return "" if found >= CUDA_FLOOR else f"device {index} is of compute capability {found[0]}.{found[1]}, not 8.0"


def _why_not_dtype(tensor: torch.Tensor) -> str:
    if not tensor.is_floating_point() or tensor.dtype in _COMPILED:
        return ""
    return f"it takes {', '.join(str(dtype).removeprefix('torch.') for dtype in _COMPILED)}, not {tensor.dtype}"


_COMPILED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TAKEN = frozenset((*_COMPILED, torch.int32, torch.int64, torch.bool))
"""What is looked at no further: a decoded token asks a hundred times."""
