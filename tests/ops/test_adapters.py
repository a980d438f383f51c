"""Other libraries' kernels: never taken unasked, refused with a reason, and right where they can run at all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from omnimoe import doctor
from omnimoe.ops import BACKENDS, BackendError, backend, experts_mlp, grouped_mm
from omnimoe.ops._backends import Implementation, choose
from omnimoe.ops.adapters import liger, megablocks
from omnimoe.ops.adapters._packages import absent
from omnimoe.ops.adapters._rows import group_of_rows, rows_by_token

ENDS = torch.tensor([1, 1, 4], dtype=torch.int32)
ROUTED = (torch.randn(3, 8), torch.randn(3, 10, 8), torch.randn(3, 8, 5), ENDS, "silu", torch.tensor([2, 0, 1, 0]))


def test_one_of_another_library_is_taken_only_when_asked_for():
    foreign = Implementation("liger", lambda: "foreign", is_foreign=True)
    own = Implementation("reference", lambda: "own")
    assert choose("op", [foreign, own])() == "own"
    with pytest.raises(BackendError, match="no implementation of op can"):
        choose("op", [foreign])


def test_rows_past_the_last_offset_have_no_group():
    assert group_of_rows(ENDS, 6).tolist() == [0, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("token_index", "tokens", "end", "found"),
    [
        ([2, 0, 1, 1, 2, 0], 3, 6, [[1, 5], [2, 3], [0, 4]]),
        ([1, 0], 2, 2, [[1], [0]]),
        ([2, 0, 1, 1, 1, 0], 3, 6, None),  # one token has three rows, another one
        ([0, 1, 2, 0], 3, 4, None),
        ([2, 0, 1, 1, 2, 0], 3, 5, None),  # the last row is a sentinel's
        ([], 0, 0, None),
    ],
)
def test_rows_by_token_where_every_token_has_as_many(token_index, tokens, end, found):
    rows = rows_by_token(torch.tensor(token_index).long(), torch.tensor([0, end], dtype=torch.int32), tokens)
    assert (None if rows is None else rows.tolist()) == found


def test_what_is_not_installed_is_said():
    assert absent("torch") == ""
    assert absent("no_such_library") == "no_such_library is not installed"
    assert absent("torch", "no_such_one", "nor_this") == "no_such_one and nor_this are not installed"


def test_megablocks_is_refused_where_it_is_not_installed():
    if importlib.util.find_spec("grouped_gemm"):
        pytest.skip("grouped_gemm is installed")
    with pytest.raises(BackendError, match="'megablocks' was asked for, but grouped_gemm is not installed"):
        backend("megablocks").__enter__()
    assert "not installed" in megablocks.why_not_experts(*ROUTED[:4], ROUTED[5])


def test_liger_is_refused_where_it_is_not_installed():
    if importlib.util.find_spec("liger_kernel"):
        pytest.skip("liger-kernel is installed")
    with pytest.raises(BackendError, match="'liger' was asked for, but liger-kernel is not installed"):
        backend("liger").__enter__()


def test_liger_says_what_it_cannot(monkeypatch):
    pytest.importorskip("triton")
    if not importlib.util.find_spec("liger_kernel"):
        pytest.skip("liger-kernel is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend("liger"):
        with pytest.raises(BackendError, match="its experts_mlp cannot: its kernels are for CUDA, and x is on cpu"):
            experts_mlp(*ROUTED)
        assert grouped_mm(ROUTED[0][:2], ROUTED[1], ENDS.clamp(max=2)).shape == (2, 10)  # of which it has none
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, into, down = ROUTED[:3]
    assert liger.why_not(x, into, down) == ""
    assert liger.why_not(x.double(), into, down) == "it takes bfloat16, float16, float32, not torch.float64"
    assert liger.why_not(x, into[:, :5], down) == "it has no experts without a gate"
    with backend("liger"), pytest.raises(BackendError, match="SiLU alone, not 'gelu'"):
        experts_mlp(*ROUTED[:4], "gelu", ROUTED[5])


def test_the_doctor_tells_of_every_other_library():
    told = doctor.examine()["other libraries"]
    assert set(told) == {"liger", "megablocks"} <= set(BACKENDS)
    assert set(told["megablocks"]) == {"grouped_mm", "experts_mlp, routed"}
    if not torch.cuda.is_available():
        assert all(reason for reasons in told.values() for reason in reasons.values())


INTERPRETED = """
import torch, omnimoe
from omnimoe.ops import experts_mlp

def ends(*sizes):
    return torch.tensor(sizes).cumsum(0).to(torch.int32)

def compare(name, sizes, tokens, token_index, weights=True, dtype=torch.float32, bound=4e-6, beyond=0):
    rows = sum(sizes) + beyond
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)
    given = [draw(tokens if token_index is not None else rows, 16), draw(3, 48, 16) / 4, draw(3, 16, 24) / 5]
    if weights:
        given.append(torch.rand(rows, generator=generator))
    found = []
    for backend, kind in (("liger", dtype), ("reference", torch.float64)):
        operands = [part.to(dtype).to(kind).requires_grad_() for part in given]
        with omnimoe.backend(backend):
            y = experts_mlp(*operands[:3], ends(*sizes), "silu", token_index, operands[3] if weights else None)
        grad = torch.ones_like(y) + torch.arange(y.numel(), dtype=y.dtype).view_as(y) / max(1, y.numel())
        found.append([y.detach(), *torch.autograd.grad(y, operands, grad)])
    for one, other in zip(*found, strict=True):
        error = float((one.double() - other).norm() / other.norm().clamp_min(1e-30))
        assert one.shape == other.shape and error <= bound, (name, error)
    print(name)

even = torch.tensor([0, 2, 3, 1, 1, 2, 0, 3])
compare("tokens", (3, 0, 5), 4, even)
compare("tokens without weights", (3, 0, 5), 4, even, weights=False)
# the interpreter has no atomic addition in bfloat16
compare("tokens in float16", (3, 0, 5), 4, even, dtype=torch.float16, bound=4e-3)
compare("uneven", (3, 0, 5), 4, torch.tensor([0, 2, 3, 1, 1, 2, 1, 3]))
compare("sentinels", (3, 0, 4), 4, even, beyond=1)
compare("in order", (3, 0, 5), 8, None, weights=False)
compare("in order with weights", (3, 0, 5), 8, None, beyond=2)
"""


@pytest.mark.slow
def test_liger_gives_the_references_values_and_gradients_in_tritons_interpreter():
    pytest.importorskip("triton")
    if not importlib.util.find_spec("liger_kernel"):
        pytest.skip("liger-kernel is not installed")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 7


@pytest.mark.gpu
def test_liger_gives_the_references_values_on_cuda():
    pytest.importorskip("liger_kernel")
    x, into, down, offsets, activation, token_index = ROUTED
    given = [part.cuda().bfloat16() for part in (x, into, down)]
    with backend("liger"):
        y = experts_mlp(*given, offsets.cuda(), activation, token_index.cuda())
    with backend("reference"):
        wanted = experts_mlp(*(part.double() for part in given), offsets.cuda(), activation, token_index.cuda())
    assert (y.double() - wanted).norm() <= 2e-2 * wanted.norm()


PRODUCT = """
import sys, torch
import omnimoe.ops.gmm
sys.modules["grouped_gemm"] = omnimoe.ops.gmm
from omnimoe.ops import grouped_mm
from omnimoe.ops.adapters import megablocks
x, weight, bias = (torch.randn(*size).bfloat16() for size in ((7, 8), (3, 6, 8), (3, 6)))
ends = torch.tensor([2, 2, 5], dtype=torch.int32)
found = megablocks.grouped_mm(x, weight, ends, bias)
assert torch.equal(found, grouped_mm(x, weight, ends, bias)), found
"""


def test_the_mapping_to_grouped_gemm_holds_with_its_surface_over_our_ops():
    done = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
