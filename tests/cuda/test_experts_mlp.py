"""The experts' network of csrc/cuda on the emulator, forward and backward, against autograd in float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, CODES, GATED
from tests.cuda import emulated

BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = (6, 0, 40, 3)
TOKENS, ROWS = 20, 52  # the last three rows are past the last offset


@dataclass(frozen=True)
class Case:
    """A network and how it is called."""

    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16
    gated: bool = True
    interleaved: bool = False
    bias: bool = False
    routed: bool = True
    weighted: bool = True
    hidden: int = 24
    width: int = 72

    def operands(self) -> list[Tensor | None]:
        """x, w_in, w_out, weights, b_in, b_out."""
        generator = torch.Generator().manual_seed(5)

        def draw(*sizes: int, scale: float = 1) -> Tensor:
            return (torch.randn(*sizes, generator=generator) * scale).to(self.dtype)

        groups, wide = len(SIZES), (2 if self.gated else 1) * self.width
        weights = torch.rand(ROWS, generator=generator).to(torch.promote_types(self.dtype, torch.float32))
        return [
            draw(TOKENS if self.routed else ROWS, self.hidden),
            draw(groups, wide, self.hidden, scale=self.hidden**-0.5),
            draw(groups, self.hidden, self.width, scale=self.width**-0.5),
            weights if self.weighted else None,
            draw(groups, wide) if self.bias else None,
            draw(groups, self.hidden) if self.bias else None,
        ]

    def token_index(self) -> Tensor | None:
        return torch.randint(0, TOKENS - 1, (ROWS,)) if self.routed else None

    def definition(self, token_index: Tensor | None, x, w_in, w_out, weights, b_in, b_out) -> tuple[Tensor, Tensor]:
        """The output and the pre-activations, a group at a time."""
        rows = x if token_index is None else x[token_index]
        z, y, stop = [], [], 0
        for group, size in enumerate(SIZES):
            start, stop = stop, stop + size
            z.append(rows[start:stop] @ w_in[group].T + (0 if b_in is None else b_in[group]))
            if not self.gated:
                hidden = ACTIVATIONS[self.activation](z[-1])
            else:
                sides = (z[-1][:, ::2], z[-1][:, 1::2]) if self.interleaved else z[-1].chunk(2, dim=1)
                hidden = GATED[self.activation](*sides)
            y.append(hidden @ w_out[group].T + (0 if b_out is None else b_out[group]))
        out = torch.cat([*y, x.new_zeros(ROWS - stop, self.hidden)])
        if weights is not None:
            out = out * weights.unsqueeze(1)
        if token_index is not None:
            out = x.new_zeros(len(x), self.hidden).index_add(0, token_index, out)
        return out, torch.cat([*z, x.new_zeros(ROWS - stop, w_in.shape[1])])


CASES = [
    *(Case(activation=name) for name in CODES),
    *(Case(activation=name, gated=False, bias=True, dtype=torch.float32) for name in ACTIVATIONS),
    *(Case(activation=name, dtype=torch.float64, hidden=9, width=11) for name in CODES),
    *(Case(dtype=dtype, interleaved=True, bias=True, hidden=13, width=21) for dtype in BOUND),
    *(Case(dtype=dtype, routed=False, weighted=False, interleaved=True) for dtype in (torch.float16, torch.float32)),
    *(Case(dtype=dtype, routed=False, bias=True) for dtype in (torch.bfloat16, torch.float32)),
    Case(activation="clamped_silu", interleaved=True, bias=True, width=64),
    Case(gated=False, hidden=130, width=140, activation="relu2", dtype=torch.float16),
    Case(weighted=False, hidden=136, width=136),
]


def offsets(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(SIZES, device=device).cumsum(0).to(torch.int32)


def distance(found: Tensor, wanted: Tensor) -> float:
    error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else float("inf")


def forward_and_backward(ops, case: Case, parts: list[Tensor | None], token_index: Tensor | None, grad: Tensor):
    x, w_in, w_out, *rest = parts
    call = (token_index, *rest, CODES[case.activation], case.interleaved)
    ends = offsets(x.device)
    out, z = ops.experts_mlp(x, w_in, w_out, ends, *call, True)
    return out, z, ops.experts_mlp_backward(grad, x, z, w_in, w_out, ends, *call)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.activation}-{str(case.dtype)[6:]}-{case.width}")
def test_values_and_gradients(ops, case):
    parts, token_index = case.operands(), case.token_index()
    grad = torch.randn(len(parts[0]), case.hidden).to(case.dtype)
    out, z, found = forward_and_backward(ops, case, parts, token_index, grad)
    exact = [None if part is None else part.double().requires_grad_() for part in parts]
    wanted, wanted_z = case.definition(token_index, *exact)
    given = [part for part in exact if part is not None]
    gradients = iter(torch.autograd.grad(wanted, given, grad.double()))
    assert distance(out, wanted.detach()) <= BOUND[case.dtype]
    assert distance(z, wanted_z.detach()) <= BOUND[case.dtype]
    for one, part in zip(found, exact, strict=True):
        if part is None:
            assert one.numel() == 0
        else:
            assert one.shape == part.shape
            assert distance(one, next(gradients)) <= BOUND[case.dtype]


def test_pre_activations_are_kept_only_if_asked_for(ops):
    case = Case(dtype=torch.float32, bias=True)
    (x, w_in, w_out, *rest), token_index = case.operands(), case.token_index()
    call = (x, w_in, w_out, offsets(), token_index, *rest, CODES["silu"], False)
    out, z = ops.experts_mlp(*call, False)
    assert z.shape == (0, w_in.shape[1])
    assert torch.equal(out, ops.experts_mlp(*call, True)[0])


def test_what_lies_past_the_last_offset_reaches_nobody(ops):
    for dtype in (torch.bfloat16, torch.float32):
        case = Case(dtype=dtype, bias=True)
        parts, token_index = case.operands(), case.token_index()
        token_index[49:] = TOKENS - 1  # a token that nobody else is of
        parts[0][-1] = float("nan")
        parts[3][49:] = float("nan")
        grad = torch.randn(TOKENS, case.hidden).to(dtype)
        grad[-1] = float("nan")
        out, z, found = forward_and_backward(ops, case, parts, token_index, grad)
        assert torch.equal(z[49:], torch.zeros_like(z[49:]))
        assert all(one.isfinite().all() for one in found[1:])
        assert torch.equal(found[3][49:], torch.zeros(3, dtype=found[3].dtype))
        assert out[:-1].isfinite().all()
        assert found[0][:-1].isfinite().all()


def test_banks_that_lie_otherwise_are_read_as_they_lie(ops):
    case = Case(dtype=torch.float16, bias=True)
    parts, token_index = case.operands(), case.token_index()
    grad = torch.randn(TOKENS, case.hidden).to(case.dtype)
    wanted = forward_and_backward(ops, case, parts, token_index, grad)
    turned = [*parts[:1], *(part.mT.contiguous().mT for part in parts[1:3]), *parts[3:]]
    found = forward_and_backward(ops, case, turned, token_index, grad)
    for one, other in zip([*found[:2], *found[2]], [*wanted[:2], *wanted[2]], strict=True):
        assert distance(one, other.double()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_threads_changes_no_bit(ops, dtype):
    case = Case(dtype=dtype, bias=True)
    parts, token_index = case.operands(), case.token_index()
    grad, found = torch.randn(TOKENS, case.hidden).to(dtype), []
    for order in emulated.ORDERS:
        with emulated.turns(order, seed=3):
            out, z, gradients = forward_and_backward(ops, case, parts, token_index, grad)
        found.append([out, z, *gradients])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_nothing_gives_nothing_and_keeps_its_shapes(ops):
    case = Case(dtype=torch.float32, bias=True)
    x, w_in, w_out, _, b_in, b_out = case.operands()
    none, index, ends = x[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    call = (index, torch.zeros(0), b_in, b_out, 0, False)
    out, z = ops.experts_mlp(none, w_in, w_out, ends, *call, True)
    assert out.shape == (0, 24)
    found = ops.experts_mlp_backward(none, none, z, w_in, w_out, ends, *call)
    for one, like in zip(found, (none, w_in, w_out, torch.zeros(0), b_in, b_out), strict=True):
        assert torch.equal(one, torch.zeros_like(like))


AUTOGRAD = """
import torch
from omnimoe.ops._library import register
from tests.cuda import emulated
register()
emulated.load()
names = [name.split("(")[0] for name in emulated.SCHEMAS]
library = torch.library.Library("omnimoe", "IMPL")
for name in names:
    library.impl(name, getattr(torch.ops.omnimoe_emulated, name), "CPU")
ops, offsets = torch.ops.omnimoe, torch.tensor([3, 3, 8], dtype=torch.int32)
torch.manual_seed(0)
def draw(*sizes): return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)
index = torch.tensor([0, 4, 1, 1, 2, 4, 3, 0, 2])
def check(function, given): return torch.autograd.gradcheck(function, given, fast_mode=True)
grouped = lambda x, w, b: ops.grouped_mm(x, w, offsets, b, index)
assert check(grouped, (draw(5, 3), draw(3, 4, 3), draw(3, 4)))
for keep in (True, False):
    network = lambda x, i, o, s, b, c: ops.experts_mlp(x, i, o, offsets, index, s, b, c, 0, False, keep)[0]
    assert check(network, (draw(5, 3), draw(3, 4, 3), draw(3, 3, 2), draw(9), draw(3, 4), draw(3, 3)))
given = (torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, 8), torch.randn(3, 8, 4), offsets, index)
torch.library.opcheck(ops.experts_mlp.default, (*given, torch.rand(9), None, None, 0, False, True))
print("right")
"""


def test_autograd_and_the_compiler_take_them_as_the_ops_of_omnimoe(ops):
    done = subprocess.run(
        [sys.executable, "-c", AUTOGRAD], capture_output=True, text=True, check=False, cwd=emulated.ROOT
    )
    assert done.stdout.strip() == "right", done.stderr[-3000:]
