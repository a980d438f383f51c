"""Triton's names for the files of kernels, and stand-ins where it is missing, so that such a file can still be read.

Nothing imports it before a kernel is launched: Triton takes a while to load, and is not there on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _leave(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """In the place of ``triton.jit``: leaves a function as it is."""
    return function or _leave


tl: Any = None
jit: Any = _leave
INTERPRETED: Any = False
"""Whether kernels run in Triton's interpreter, on the CPU; it multiplies the bits of bfloat16 as integers."""

try:
    import triton
    import triton.language as _language
except ImportError:
    pass  # missing_triton says so
else:
    tl, jit, INTERPRETED = _language, triton.jit, _language.constexpr(triton.knobs.runtime.interpret)
