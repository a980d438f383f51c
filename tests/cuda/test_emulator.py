"""The emulator refuses what is undefined on a device, so that what passes on it means something."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from tests.cuda import emulated

MISTAKES = {
    "none": "",
    "reads_before_wait": "",
    "reads_before_barrier": "",
    "part_of_a_block_at_a_barrier": "deadlock: .* __syncthreads at faults.cpp:.* from thread 32 on: done",
    "warp_diverges": "the threads of a warp diverge: __shfl_xor_sync at .* meets __shfl_xor_sync",
    "shuffle_of_half_a_warp": "a shuffle of part of a warp",
    "reads_past_the_end": "a read of 4 bytes out of bounds .*: 0 bytes past the end of x",
    "writes_past_the_end": "a write of 4 bytes out of bounds .*: 0 bytes past the end of out",
    "writes_an_input": "a write into x",
    "misaligned_copy": "a misaligned access of 16 bytes",
    "copy_past_the_end": "a read of 16 bytes out of bounds",
    "shared_past_the_end": "wrote outside its shared memory, at byte 1024",
    "misaligned_vector": "a misaligned access of 16 bytes",
    "misaligned_ldmatrix": "ldmatrix of a misaligned row",
}
"""In the order of the enumeration in ``faults.cpp``: what is said. Without words, but for ``none``, NaN tells."""


@pytest.fixture(scope="session")
def faults() -> Path:
    return emulated.compile_library("faults.cpp")


def run(library: Path, mistake: str, order: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    x, out = torch.randn(203), torch.full((64,), torch.nan)
    told = ctypes.create_string_buffer(1000)
    pointers = [ctypes.c_void_p(part.data_ptr()) for part in (x, out)]
    index = list(MISTAKES).index(mistake)
    function = ctypes.CDLL(str(library)).sum_with
    failed = function(index, emulated.ORDERS.index(order), pointers[0], len(x), pointers[1], told, len(told))
    assert bool(failed) == bool(told.value)
    return told.value.decode(), x, out


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_a_right_kernel_is_right_in_every_order(faults, order):
    told, x, out = run(faults, "none", order)
    assert told == ""
    torch.testing.assert_close(out, x.sum().expand(64))


@pytest.mark.parametrize("mistake", [name for name, words in MISTAKES.items() if words])
def test_a_mistake_is_told(faults, mistake):
    told, _, _ = run(faults, mistake, "fair")
    assert re.search(MISTAKES[mistake], told), told


@pytest.mark.parametrize("mistake", ["reads_before_wait", "reads_before_barrier"])
@pytest.mark.parametrize("order", ["fair", "eager", "reversed"])
def test_what_is_read_too_early_is_not_a_number(faults, mistake, order):
    told, _, out = run(faults, mistake, order)
    assert told == ""
    assert out.isnan().any()
