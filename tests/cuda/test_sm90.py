"""The Hopper kernels on the emulator, against float64; and whether the emulator finds mistakes in the use of wgmma.

Nothing here runs on a GPU. What an instruction does is the emulator's reading of the PTX ISA, see ``emulator/sm90*.h``.
"""

from __future__ import annotations

import ctypes
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, CODES, GATED
from tests.cuda import emulated

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
GRADIENT_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
MISTAKES = {
    "none": "",
    "reads_before_landing": "changes while it is read|in flight",
    "expects_too_few_bytes": "changes while it is read|deadlock|in flight",
    "expects_too_many_bytes": "deadlock: .* on: an mbarrier",
    "no_fence_of_registers": "registers go to wgmma without a fence",
    "reads_before_wait": "",
    "touches_in_flight": "accumulators are touched while wgmma works on them",
    "refills_while_read": "an operand of the wgmma .* changes while it is read",
    "writes_without_proxy_fence": "",
    "writes_with_proxy_fence": "",
    "warps_disagree": "multiply different things|does not begin with the pattern",
    "barrier_not_shown": "the copy engine does not see the mbarrier yet",
    "other_leading_offset": "",
    "other_stride_offset": "",
    "tile_off_the_pattern": "a box in 128B swizzle at no multiple of 1024",
    "descriptor_without_swizzle": "a descriptor that is not of 128B swizzling",
}
"""In the order of the enumeration in ``emulator/sm90_faults.cpp``: what is said."""


@pytest.fixture(scope="session")
def faults() -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulated.compile_library("sm90_faults.cpp")))
    library.multiply_once.restype = ctypes.c_char_p
    return library


def multiply_once(faults: ctypes.CDLL, mistake: str, across: tuple[bool, bool], order: str = "fair"):
    """What the emulator says, and the product's error; operands lie along the depth, or across it."""
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(128, 64).bfloat16()
    stored = [x.T.contiguous() if is_across else x for x, is_across in zip((a, b), across, strict=True)]
    out = torch.full((64, 128), torch.nan)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*stored, out)]
    said = faults.multiply_once(
        *map(int, across), *pointers[:2], list(MISTAKES).index(mistake), pointers[2], emulated.ORDERS.index(order)
    )
    return said.decode(), error(out, a.double() @ b.double().T)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, by norm; NaN is NaN."""
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def ends_of(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def spans_of(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


@pytest.fixture
def hopper(ops, monkeypatch) -> Any:
    """The ops, for a device of compute capability 9; the test must have used wgmma."""
    monkeypatch.setenv("OMNIMOE_EMULATED_CAPABILITY", "9")
    before = emulated.load().hopper_products()
    yield ops
    assert emulated.load().hopper_products() > before, "the Hopper kernels were not called"


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("across", [(False, False), (False, True), (True, False), (True, True)])
def test_a_right_kernel_is_right_in_every_order(faults, across, order):
    said, off = multiply_once(faults, "none", across, order)
    assert said == ""
    assert off < 1e-6


@pytest.mark.parametrize("mistake", [name for name, words in MISTAKES.items() if words])
def test_a_mistake_is_told(faults, mistake):
    said, _ = multiply_once(faults, mistake, (False, True))
    assert re.search(MISTAKES[mistake], said), said


def test_accumulators_are_not_numbers_before_the_wait(faults):
    said, off = multiply_once(faults, "reads_before_wait", (False, False))
    assert said == ""
    assert not off < 1e6


def test_wgmma_sees_ordinary_writes_after_a_proxy_fence_alone(faults):
    assert multiply_once(faults, "writes_without_proxy_fence", (False, False)) == ("", pytest.approx(0, abs=1e-6))
    assert multiply_once(faults, "writes_with_proxy_fence", (False, False)) == ("", pytest.approx(1))


@pytest.mark.parametrize(
    ("mistake", "across", "matters"),
    [
        ("other_leading_offset", False, False),  # not used along the depth
        ("other_leading_offset", True, True),
        ("other_stride_offset", True, True),
    ],
)
def test_offsets_of_descriptors_mean_what_they_say(faults, mistake, across, matters):
    said, off = multiply_once(faults, mistake, (False, across))
    assert (not off < 1e-3 or said != "") == matters


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("sizes", "extra", "depth", "columns"),
    [
        ((70, 0, 131), 29, 200, 264),
        ((1,), 0, 8, 8),
        ((0, 0, 300, 2), 0, 72, 136),
        ((64, 128, 65), 3, 328, 256),
        (tuple(range(40)), 5, 16, 24),
        ((0, 0), 10, 64, 64),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm(ops, monkeypatch, dtype, sizes, extra, depth, columns, transposed):
    monkeypatch.setenv("OMNIMOE_EMULATED_CAPABILITY", "9")
    before = emulated.load().hopper_products()
    ends = ends_of(sizes)
    x = torch.randn(sum(sizes) + extra, depth, dtype=dtype)
    weight = torch.randn(len(sizes), *((depth, columns) if transposed else (columns, depth)), dtype=dtype)
    bias = torch.randn(len(sizes), columns, dtype=dtype)
    x[sum(sizes) :] = torch.inf
    found = ops.grouped_mm(x, weight, ends, bias, None, transposed)
    wanted = torch.zeros(len(x), columns, dtype=torch.float64)
    for group, (start, end) in enumerate(spans_of(ends)):
        matrix = weight[group].double() if transposed else weight[group].double().T
        wanted[start:end] = x[start:end].double() @ matrix + bias[group].double()
    assert error(found, wanted) < TOLERANCE[dtype]
    assert not found[sum(sizes) :].any()
    assert (emulated.load().hopper_products() > before) == (sum(sizes) > 0)


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("pairs", ["", "0"])
def test_turns_of_threads_change_no_bit(hopper, monkeypatch, order, pairs):
    ends = ends_of((70, 0, 131))
    x, weight = torch.randn(205, 328).bfloat16(), torch.randn(3, 264, 328).bfloat16()
    index = torch.randint(0, 205, (205,))
    fair = hopper.grouped_mm(x, weight, ends, None, index), hopper.grouped_wgrad(x[:, :136], x, ends, None, index)
    monkeypatch.setenv("OMNIMOE_HOPPER_PAIRS", pairs)  # nor do blocks that work in pairs
    with emulated.turns(order, seed=3):
        found = hopper.grouped_mm(x, weight, ends, None, index), hopper.grouped_wgrad(x[:, :136], x, ends, None, index)
    for one, other in zip(fair, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("columns", [24, 264])
def test_gathered_rows_come_by_index(hopper, columns):
    ends = ends_of((70, 0, 131))
    x, weight = torch.randn(50, 100).half()[:, :92], torch.randn(3, columns, 96).half()[:, :, :92]
    index = torch.randint(0, 50, (210,))
    index[[3, 100]] = torch.tensor([-1, 50])  # rows that are not there are zeros
    rows = torch.where((index >= 0) & (index < 50), 1, 0)[:, None] * x[index.clamp(0, 49)].double()
    x = torch.randn(50, 104).half()[:, :92].copy_(x)  # rows of 16 bytes
    found = hopper.grouped_mm(x, weight, ends, None, index)
    wanted = torch.zeros(210, columns, dtype=torch.float64)
    for group, (start, end) in enumerate(spans_of(ends)):
        wanted[start:end] = rows[start:end] @ weight[group].double().T
    assert error(found, wanted) < TOLERANCE[torch.float16]


@settings(max_examples=25)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 7, 63, 64, 65, 128, 150]), min_size=1, max_size=7).filter(any),
    depth=st.integers(1, 200),
    columns=st.integers(1, 40).map(lambda eighths: 8 * eighths),
    transposed=st.booleans(),
    is_gathered=st.booleans(),
    settings_of=st.sampled_from([{}, {"OMNIMOE_HOPPER_GATHER": "0"}, {"OMNIMOE_HOPPER_PAIRS": "0"}]),
    order=st.sampled_from(emulated.ORDERS),
)
def test_any_shape_there_and_back(ops, sizes, depth, columns, transposed, is_gathered, settings_of, order):
    ends, wide, rows = ends_of(tuple(sizes)), (depth + 7) // 8 * 8, sum(sizes) + 3
    x = torch.randn(rows, wide).bfloat16()[:, :depth]
    grad = torch.randn(rows, columns).bfloat16()
    shape = (len(sizes), depth, columns) if transposed else (len(sizes), columns, wide)
    weight = torch.randn(shape).bfloat16()[..., : columns if transposed else depth]
    index = torch.randint(0, rows, (rows,)) if is_gathered else None
    taken = x if index is None else x[index]
    before = emulated.load().hopper_products()
    with pytest.MonkeyPatch.context() as patch, emulated.turns(order, seed=depth):
        patch.setenv("OMNIMOE_EMULATED_CAPABILITY", "9")
        for name, value in settings_of.items():
            patch.setenv(name, value)
        found = ops.grouped_mm(x, weight, ends, None, index, transposed)
        bank = ops.grouped_wgrad(x, grad, ends, index, None)
    for group, (start, end) in enumerate(spans_of(ends)):
        matrix = weight[group].double() if transposed else weight[group].double().T
        if end > start:
            assert error(found[start:end], taken[start:end].double() @ matrix) < TOLERANCE[torch.bfloat16]
            assert error(bank[group], taken[start:end].double().T @ grad[start:end].double()) < 4e-3
    # rows that were gathered first lie as close as they may, which need not be 16 bytes apart
    assert emulated.load().hopper_products() > before or "OMNIMOE_HOPPER_GATHER" in settings_of


def test_bad_offsets_reach_nothing_outside(hopper):
    x, weight = torch.randn(100, 64).bfloat16(), torch.randn(4, 72, 64).bfloat16()
    found = hopper.grouped_mm(x, weight, torch.tensor([30, -5, 20, 1000], dtype=torch.int32))
    wanted = torch.cat([x[:30].double() @ weight[0].double().T, x[30:].double() @ weight[3].double().T])
    assert error(found, wanted) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gathered", ["neither", "grad", "x", "both"])
@pytest.mark.parametrize(
    ("sizes", "columns", "depth"), [((70, 0, 131), 136, 264), ((5, 64, 1, 130), 61, 8), ((0, 192), 200, 72)]
)
def test_grouped_wgrad(hopper, dtype, gathered, sizes, columns, depth):
    ends, rows = ends_of(sizes), sum(sizes) + 7
    wide = (columns + 7) // 8 * 8
    grad, x = torch.randn(rows, wide, dtype=dtype)[:, :columns], torch.randn(rows, depth, dtype=dtype)
    by_grad, by_x = (torch.randperm(rows) if gathered in (name, "both") else None for name in ("grad", "x"))
    of_grad, of_x = (rest if by is None else rest[by] for rest, by in ((grad, by_grad), (x, by_x)))
    wanted = torch.stack([of_grad[start:end].double().T @ of_x[start:end].double() for start, end in spans_of(ends)])
    # what no group has must not count, whatever it is
    last = torch.arange(sum(sizes), rows)
    grad[last if by_grad is None else by_grad[last]] = torch.inf
    x[last if by_x is None else by_x[last]] = torch.nan
    found = hopper.grouped_wgrad(grad, x, ends, by_grad, by_x)
    assert error(found, wanted) < TOLERANCE[dtype]
    assert not found[[end == start for start, end in spans_of(ends)]].any()


def network(x, w_in, w_out, weights, b_in, b_out, ends, token_index, activation, is_interleaved):
    """What experts_mlp means, in the dtype of its operands."""
    rows, parts = x if token_index is None else x[token_index], []
    for group, (start, end) in enumerate(spans_of(ends)):
        z = rows[start:end] @ w_in[group].T + (0 if b_in is None else b_in[group])
        if w_in.shape[1] == w_out.shape[2]:
            hidden = ACTIVATIONS[activation](z)
        else:
            hidden = GATED[activation](*((z[:, ::2], z[:, 1::2]) if is_interleaved else z.chunk(2, dim=1)))
        y = hidden @ w_out[group].T + (0 if b_out is None else b_out[group])
        parts.append(y * weights[start:end, None])
    y = torch.cat([*parts, x.new_zeros(len(rows) - int(ends[-1]), x.shape[1])])
    return y if token_index is None else x.new_zeros(x.shape).index_add(0, token_index, y)


CASES = [
    *((activation, "halves", torch.bfloat16, True, True) for activation in GATED),
    *((activation, "plain", torch.bfloat16, True, True) for activation in ACTIVATIONS),
    ("clamped_silu", "pairs", torch.bfloat16, True, True),
    ("gelu", "pairs", torch.float16, False, False),
    ("silu", "halves", torch.float16, True, False),
    ("silu", "halves", torch.bfloat16, False, False),
]


@pytest.mark.parametrize("layout", ["halves", "pairs", "plain"])
def test_experts_mlp_by_pairs_of_blocks(hopper, monkeypatch, layout):
    monkeypatch.setenv("OMNIMOE_HOPPER_PAIRS", "0")
    test_experts_mlp_and_its_gradients(hopper, "silu", layout, torch.bfloat16, True, True)


@pytest.mark.parametrize(("activation", "layout", "dtype", "is_routed", "has_bias"), CASES)
def test_experts_mlp_and_its_gradients(hopper, activation, layout, dtype, is_routed, has_bias):
    sizes, tokens, hidden, width = (60, 0, 131, 3), 90, 72, 136
    ends, rows, is_gated = ends_of(sizes), sum(sizes) + 7, layout != "plain"
    x = torch.randn(tokens if is_routed else rows, hidden, dtype=dtype)
    w_in = (2 * torch.randn(4, 2 * width if is_gated else width, hidden) / hidden**0.5).to(dtype)
    w_out = (torch.randn(4, hidden, width) / width**0.5).to(dtype)
    biases = [torch.randn(4, wide).to(dtype) if has_bias else None for wide in (w_in.shape[1], hidden)]
    token_index = torch.randint(0, tokens, (rows,)) if is_routed else None
    given = [x, w_in, w_out, torch.rand(rows), *biases]
    exact = [None if part is None else part.double().requires_grad_() for part in given]
    wanted = network(*exact, ends, token_index, activation, layout == "pairs")
    code, is_pairs = CODES[activation], layout == "pairs"
    out, z = hopper.experts_mlp(x, w_in, w_out, ends, token_index, *given[3:], code, is_pairs, True)
    assert error(out, wanted.detach()) < TOLERANCE[dtype]
    assert not z[sum(sizes) :].any()
    grad = torch.randn(wanted.shape, dtype=dtype)
    wanted_grads = torch.autograd.grad(wanted, [part for part in exact if part is not None], grad.double())
    grads = hopper.experts_mlp_backward(grad, x, z, w_in, w_out, ends, token_index, *given[3:], code, is_pairs)
    for found, want in zip(grads, wanted_grads, strict=False):
        assert error(found, want) < GRADIENT_TOLERANCE[dtype]
    without_z, none = hopper.experts_mlp(x, w_in, w_out, ends, token_index, *given[3:], code, is_pairs, False)
    assert torch.equal(without_z, out)
    assert len(none) == 0


@pytest.mark.parametrize("kind", ["float32", "odd width", "odd stride", "expanded bank"])
def test_what_the_copy_engine_cannot_fetch_goes_to_the_other_kernels(ops, monkeypatch, kind):
    monkeypatch.setenv("OMNIMOE_EMULATED_CAPABILITY", "9")
    before = emulated.load().hopper_products()
    ends, dtype = ends_of((20, 13)), torch.float32 if kind == "float32" else torch.bfloat16
    x = torch.randn(33, 17, dtype=dtype)[:, :16] if kind == "odd stride" else torch.randn(33, 16, dtype=dtype)
    weight = torch.randn(2, 15 if kind == "odd width" else 24, 16, dtype=dtype)
    if kind == "expanded bank":
        weight = weight[:1].expand(2, -1, -1)
    wanted = torch.cat([x[s:e].double() @ weight[g].double().T for g, (s, e) in enumerate(spans_of(ends))])
    assert error(ops.grouped_mm(x, weight, ends), wanted) < TOLERANCE[torch.bfloat16]
    assert emulated.load().hopper_products() == before
