"""Which implementation runs, what is said where one cannot, and how the kernels come to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import omnimoe
from omnimoe.ops import BackendError, _backends, _extension, backend, experts_mlp, grouped_mm
from omnimoe.ops._backends import Implementation, choose

ROOT = Path(__file__).parents[2]
OFFSETS = torch.tensor([1, 2], dtype=torch.int32)


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, with a changed environment."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_first_that_can_is_taken_and_a_wish_is_kept():
    able = [Implementation("torch", lambda: "torch", lambda *_: "no"), Implementation("reference", lambda: "reference")]
    assert choose("op", able, 1)() == "reference"
    with backend("reference"):
        assert choose("op", able, 1)() == "reference"
    with backend("torch"), pytest.raises(BackendError, match="'torch' was asked for, but its op cannot: no"):
        choose("op", able, 1)
    with pytest.raises(BackendError, match="no implementation of op can: torch: no"):
        choose("op", able[:1], 1)


def test_an_unknown_backend_is_refused_before_anything_runs():
    with pytest.raises(BackendError, match="unknown backend 'cudnn'; known: reference, torch, cpp"), backend("cudnn"):
        raise AssertionError
    done = in_a_process(
        "import torch, omnimoe.ops as o; o.grouped_mm(torch.ones(1, 2), torch.ones(1, 3, 2), torch.tensor([1]).int())",
        OMNIMOE_BACKEND="cudnn",
    )
    assert "unknown backend 'cudnn'" in done.stderr


def test_a_wish_ends_with_its_block_even_after_an_error():
    with pytest.raises(KeyError), omnimoe.backend("reference"):
        raise KeyError
    assert _backends._asked == [""]


def test_float64_routed_rows_and_a_traced_graph_choose_what_serves_them(compiled):
    x, weight = torch.randn(2, 4), torch.randn(2, 3, 4)
    assert grouped_mm(x.double(), weight.double(), OFFSETS).dtype == torch.float64
    torch._dynamo.reset()
    traced = torch.compile(grouped_mm, fullgraph=True)(x, weight, OFFSETS)
    torch.testing.assert_close(traced, grouped_mm(x, weight, OFFSETS))
    into, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    for name in ("reference", "torch", "cpp"):
        with backend(name):
            found = experts_mlp(x, into, down, OFFSETS, "silu", torch.tensor([1, 1]), torch.ones(2))
        torch.testing.assert_close(found, experts_mlp(x, into, down, OFFSETS, "silu", torch.tensor([1, 1])))


def test_a_dtype_that_the_kernels_do_not_have_is_said(compiled):
    x = torch.randn(2, 4).to(torch.complex64)
    assert "it takes float32" in _backends.why_not_compiled(x.real.to(torch.float8_e4m3fn))
    assert _backends.why_not_compiled(x.to("meta")) == "a tensor is on meta"


@pytest.mark.parametrize("instructions", _extension.SETS)
def test_every_instruction_set_gives_the_reference_values(compiled, instructions):
    order = ["avx512bf16", "avx512", "avx2"]
    best = _extension.extension().instructions
    if order.index(instructions) < order.index(best):
        pytest.skip(f"this processor has {best}")
    done = in_a_process(
        """
import torch, omnimoe
from omnimoe.ops import _extension, experts_mlp, grouped_mm, selective_scan
print(_extension.extension().instructions)
torch.manual_seed(0)
for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for sizes, hidden, width in (((5, 0, 37), 40, 21), ((1, 2, 3), 17, 64)):
        ends = torch.tensor(sizes).cumsum(0).int()
        x, rows = torch.randn(20, hidden).to(dtype), torch.randint(0, 20, (sum(sizes),))
        operands = [x, torch.randn(3, 2 * width, hidden).to(dtype) / 4, torch.randn(3, hidden, width).to(dtype) / 4]
        found = []
        for name, kind in (("cpp", dtype), ("reference", torch.float64)):
            given = [part.to(kind).requires_grad_() for part in operands]
            with omnimoe.backend(name):
                y = experts_mlp(*given, ends, "silu", rows).double()
                y = y + grouped_mm(given[0][:6], given[2].transpose(1, 2), ends.clamp_max(6)).double().mean()
            found.append([y, *torch.autograd.grad(y.square().sum(), given)])
        for one, other in zip(*found):
            error = (one.double() - other).norm() / other.norm()
            assert error <= bound, (dtype, sizes, float(error))
x, step, into, out = (torch.rand(2, 40, width) for width in (19, 19, 5, 5))
operands = [x, step, -torch.rand(19, 5), into, out]
found = []
for name, kind in (("cpp", torch.float32), ("reference", torch.float64)):
    given = [part.to(kind).requires_grad_() for part in operands]
    with omnimoe.backend(name):
        y = selective_scan(*given)[0].double()
    found.append([y, *torch.autograd.grad(y.square().sum(), given)])
for one, other in zip(*found):
    assert (one.double() - other).norm() <= 2e-6 * other.norm()
""",
        OMNIMOE_CPU=instructions,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == instructions


def test_without_a_compiler_everything_works_and_the_reason_is_told(tmp_path):
    code = """
import torch, omnimoe
from omnimoe.ops import experts_mlp, missing_kernels
one = torch.tensor([1], dtype=torch.int32)
y = experts_mlp(torch.ones(1, 2), torch.ones(1, 6, 2), torch.ones(1, 2, 3), one, "silu", torch.tensor([0]))
print(y.shape, missing_kernels())
with omnimoe.backend("cpp"): pass
"""
    done = in_a_process(code, CXX="no-such-compiler", OMNIMOE_KERNELS=str(tmp_path))
    assert "torch.Size([1, 2]) there is no C++ compiler (no-such-compiler)" in done.stdout
    assert "backend 'cpp' was asked for, but there is no C++ compiler" in done.stderr
    done = in_a_process(code, OMNIMOE_BUILD="0", OMNIMOE_KERNELS=str(tmp_path))
    assert "OMNIMOE_BUILD=0 forbids" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing_and_its_message(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: this compiler is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(broken))
        with pytest.raises(_extension.BuildError, match="broken failed: x.cpp:1: error: this compiler is broken"):
            _extension.build(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_told(tmp_path):
    (tmp_path / _extension.library_name()).write_bytes(b"not a library")
    done = in_a_process(
        "from omnimoe.ops import missing_kernels; print(missing_kernels())", OMNIMOE_KERNELS=str(tmp_path)
    )
    assert "cannot be loaded" in done.stdout


@pytest.mark.slow
def test_two_processes_that_build_at_once_both_get_it(tmp_path):
    code = "from omnimoe.ops import _extension; print(_extension.extension())"
    environment = {**os.environ, "OMNIMOE_KERNELS": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        told, _ = process.communicate(timeout=600)
        assert "reason=''" in told
    assert [file.name for file in tmp_path.iterdir()] == [_extension.library_name()]


def test_memory_of_gradients_is_taken_again(compiled):
    x, weight = torch.randn(8, 512), torch.randn(2, 512, 512)
    offsets = torch.tensor([4, 8], dtype=torch.int32)
    wgrad = torch.ops.omnimoe.grouped_wgrad
    grad = x @ weight[0]
    first = wgrad(grad, x, offsets)
    kept, values = first.data_ptr(), first.clone()
    second = wgrad(grad, x, offsets)
    assert second.data_ptr() != kept  # while somebody holds it, it is not handed out
    assert torch.equal(first, values)
    del first
    third = wgrad(grad, x, offsets)
    assert third.data_ptr() == kept
    assert torch.equal(third, second)
