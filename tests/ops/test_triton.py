"""The Triton path around its kernels: who chooses it, what is said where it cannot run, tiles; and a run on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnimoe.ops import BACKENDS, BackendError, backend
from omnimoe.ops.experts_mlp import KERNELS_FIRST as EXPERTS
from omnimoe.ops.experts_mlp.activations import CLAMP_LIMIT, CLAMP_SLOPE, CODES
from omnimoe.ops.grouped_mm import IMPLEMENTATIONS, KERNELS_FIRST
from omnimoe.ops.triton import is_interpreted, missing_triton, tiles, why_not_triton

ROOT = Path(__file__).parents[2]


def in_a_process(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("part", ["network", "not network"])
def test_the_kernels_give_the_reference_values_in_the_interpreter(part):
    pytest.importorskip("triton")
    done = in_a_process(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "timeout=0", "-k", part,
        "tests/ops/test_triton_kernels.py",
        TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout[-2000:]


def test_without_triton_everything_is_imported_and_the_reason_is_told():
    code = """
import sys
sys.modules["triton"] = None
import torch, omnimoe
from omnimoe.ops import experts_mlp
from omnimoe.ops.triton import launch, missing_triton, products
one = torch.tensor([1], dtype=torch.int32)
print(experts_mlp(torch.ones(1, 2), torch.ones(1, 6, 2), torch.ones(1, 2, 3), one).shape, missing_triton())
with omnimoe.backend("triton"): pass
"""
    done = in_a_process("-c", code, OMNIMOE_BACKEND="reference")
    assert "torch.Size([1, 2]) triton is not installed" in done.stdout, done.stderr
    assert "backend 'triton' was asked for, but triton is not installed" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available() or is_interpreted(), reason="Triton can run here")
def test_without_a_gpu_it_is_refused_with_the_reason():
    pytest.importorskip("triton")
    assert missing_triton() == "there is no CUDA device"
    assert why_not_triton(torch.ones(2)) == "there is no CUDA device"
    with pytest.raises(BackendError, match="'triton' was asked for, but there is no CUDA device"), backend("triton"):
        raise AssertionError


def test_routed_rows_and_looping_products_take_kernels_before_torch():
    assert "triton" in BACKENDS
    for order in (EXPERTS, KERNELS_FIRST):
        names = [implementation.backend for implementation in order]
        assert names.index("triton") < names.index("torch") < names.index("reference")
    names = [implementation.backend for implementation in IMPLEMENTATIONS]
    assert names.index("torch") < names.index("triton") < names.index("reference")


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=9),
    beyond=st.integers(0, 300),
    block=st.sampled_from([16, 64, 128]),
)
def test_a_grid_that_no_offset_is_read_for_is_long_enough(sizes, beyond, block):
    needed = sum(-(-size // block) for size in [*sizes, beyond])
    rows = sum(sizes) + beyond
    given_ = tiles.num_row_tiles(rows, len(sizes), block)
    assert needed <= given_ <= rows // block + len(sizes) + 1


def test_operands_of_all_stages_fit_the_shared_memory_of_small_devices():
    for dtype, tile in tiles.all_tiles():
        # one stage is in registers, but where the matrix units read shared memory, which is larger there
        held = (tile.rows + tile.columns) * tile.depth * dtype.itemsize * (tile.stages - 1)
        assert held <= tiles.SHARED_MEMORY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_rows_a_group_never_take_a_smaller_tile(dtype):
    rows = [tiles.product_tile(dtype, 64 * mean, 64).rows for mean in (0, 1, 16, 17, 33, 64, 65, 4096)]
    assert rows == sorted(rows)
    assert rows[0] == 16
    pairs = tiles.product_tile(dtype, 4096, 8, pairs=True)
    assert pairs.columns * 2 == tiles.product_tile(dtype, 4096, 8).columns


def test_numbers_that_the_kernels_write_out_are_those_of_the_definition():
    assert list(CODES) == ["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu"]
    assert (CLAMP_LIMIT, CLAMP_SLOPE) == (7.0, 1.702)
