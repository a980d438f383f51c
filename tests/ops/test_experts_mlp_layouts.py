"""Biases, gate and up in turns, matrices the other way round, and what is kept for backward, beside a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import ACTIVATIONS, GATED, backend, experts_mlp

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
LAYOUTS = [
    {"gated": gated, "interleaved": interleaved, "transposed": transposed}
    for gated in (True, False)
    for interleaved in (False, True)
    for transposed in (False, True)
    if gated or not interleaved
]


@pytest.fixture(params=["reference", "torch", "cpp"])
def through(request):
    """Runs the test within one backend."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    with backend(request.param):
        yield request.param


def ends(sizes) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def loop(x, into, down, weights, into_bias, down_bias, sizes, activation, token_index, *, interleaved, transposed):
    """A group after the other, in float64."""
    out, start = torch.zeros_like(x), 0
    if transposed:
        into, down = into.transpose(1, 2), down.transpose(1, 2)
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        tokens = torch.arange(len(x))[rows] if token_index is None else token_index[rows]
        hidden = x[tokens] @ into[group].t() + into_bias[group]
        if into.shape[1] == down.shape[2]:
            hidden = ACTIVATIONS[activation](hidden)
        else:
            hidden = GATED[activation](*((hidden[:, ::2], hidden[:, 1::2]) if interleaved else hidden.chunk(2, dim=1)))
        y = (hidden @ down[group].t() + down_bias[group]) * (1 if weights is None else weights[rows].unsqueeze(1))
        out = out.index_add(0, tokens, y)
        start += size
    return out


def check(
    sizes, dtype, activation, *, hidden=19, width=21, tokens=11, beyond=2, routed=True, gated=True, interleaved=False,
    transposed=False, save="pre_activation", seed=0,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    rows, wide, groups = sum(sizes) + beyond, (2 if gated else 1) * width, len(sizes)
    into, down = normal(groups, wide, hidden, scale=2 / hidden**0.5), normal(groups, hidden, width, scale=width**-0.5)
    if transposed:
        into, down = into.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights = torch.rand(rows, generator=generator).to(torch.promote_types(dtype, torch.float32)) if routed else None
    token_index = torch.randint(0, tokens, (rows,), generator=generator) if routed else None
    parts = [
        normal(tokens if routed else rows, hidden),
        into,
        down,
        weights,
        normal(groups, wide),
        normal(groups, hidden),
    ]
    given_ = [None if part is None else part.clone().requires_grad_() for part in parts]
    exact = [None if part is None else part.double().requires_grad_() for part in parts]
    layout = {"interleaved": interleaved, "transposed": transposed}
    x, into, down, weights, into_bias, down_bias = given_
    y = experts_mlp(
        x, into, down, ends(sizes), activation, token_index, weights, gate_up_bias=into_bias, down_bias=down_bias,
        save=save, **layout,
    )  # fmt: skip
    right = loop(*exact, sizes, activation, token_index, **layout)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    found = [y, *torch.autograd.grad(y, [part for part in given_ if part is not None], grad)]
    inputs = [part for part in exact if part is not None]
    wanted = [right, *torch.autograd.grad(right, inputs, grad.double(), allow_unused=True, materialize_grads=True)]
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        error = (one.double() - other).norm()
        assert error <= TOLERANCE[dtype] * other.norm(), (number, float(error / other.norm()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(key for key, holds in layout.items() if holds))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routed", [True, False])
def test_values_and_gradients_in_every_layout(through, layout, dtype, routed):
    check((5, 0, 7, 3), dtype, "clamped_silu" if layout["gated"] else "relu2", routed=routed, **layout)
    check((40, 1, 9), dtype, "silu", hidden=64, width=48, routed=routed, **layout)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any),
    hidden=st.integers(1, 70),
    width=st.integers(1, 70),
    tokens=st.integers(1, 40),
    beyond=st.integers(0, 3),
    routed=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    save=st.sampled_from(["pre_activation", "none"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_compiled_kernels_at_drawn_shapes(compiled, sizes, dtype, activation, layout, **shape):
    with backend("cpp"):
        check(sizes, dtype, activation, **layout, **shape)


@pytest.mark.parametrize("save", ["pre_activation", "none"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(through, save, interleaved):
    index, offsets = torch.tensor([2, 0, 1, 1, 2]), ends((2, 0, 3))
    shapes = [(3, 3), (3, 8, 3), (3, 3, 4), (5,), (3, 8), (3, 3)]
    given_ = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(x, into, down, weights, into_bias, down_bias):
        return experts_mlp(
            x, into, down, offsets, "silu", index, weights, gate_up_bias=into_bias, down_bias=down_bias,
            interleaved=interleaved, save=save,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, given_)


def kept_by(call, parameters) -> list[int]:
    """Bytes of each tensor that is kept for backward, parameters aside."""
    kept, known = [], {part.untyped_storage().data_ptr() for part in parameters}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sorted(size for size in kept if size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("save", ["pre_activation", "none"])
def test_the_bytes_that_are_kept_are_those_that_are_said(compiled, save, gated, dtype):
    """The input T * D, the pre-activations R * 2F unless they are made again, and indices and weights, R each."""
    sizes, tokens, hidden, width = (6, 2, 0, 9), 10, 32, 48
    rows, wide, item = sum(sizes), (2 if gated else 1) * width, dtype.itemsize
    banks = [torch.randn(4, wide, hidden), torch.randn(4, hidden, width), torch.randn(4, wide), torch.randn(4, hidden)]
    into, down, into_bias, down_bias = (bank.to(dtype).requires_grad_() for bank in banks)
    x, weights = torch.randn(tokens, hidden).to(dtype).requires_grad_(), torch.rand(rows, requires_grad=True)
    token_index, offsets = torch.randint(0, tokens, (rows,)), ends(sizes)

    def call():
        with backend("cpp"):
            experts_mlp(
                x, into, down, offsets, "silu", token_index, weights, gate_up_bias=into_bias, down_bias=down_bias,
                save=save,
            )  # fmt: skip

    indices = [offsets.numel() * 4, rows * 8, rows * 4]
    wanted = [tokens * hidden * item, *indices]
    if save == "pre_activation":
        wanted.append(rows * wide * item)
    assert kept_by(call, (into, down, into_bias, down_bias)) == sorted(wanted)


def test_what_is_made_again_is_what_was_kept_bit_for_bit(compiled):
    sizes = (70, 3, 0, 41)
    x, into, down = torch.randn(40, 33), torch.randn(4, 50, 33) / 4, torch.randn(4, 33, 25) / 4
    index = torch.randint(0, 40, (sum(sizes),))
    for dtype in (torch.float32, torch.bfloat16):
        given_ = [part.to(dtype).requires_grad_() for part in (x, into, down)]
        found = []
        for save in ("pre_activation", "none"):
            with backend("cpp"):
                y = experts_mlp(*given_, ends(sizes), "gelu", index, save=save)
            found.append(torch.autograd.grad(y.square().sum(), given_))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_matrices_the_other_way_round_are_read_as_they_lie(compiled):
    """The kernels take strides: what they keep and what they allocate is no copy of a bank."""
    x, into, down = torch.randn(6, 64), torch.randn(4, 64, 256), torch.randn(4, 128, 64)
    from torch.profiler import ProfilerActivity, profile

    with backend("cpp"), torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        experts_mlp(x, into, down, ends((2, 1, 0, 3)), transposed=True, interleaved=True)
    most = max(event.cpu_memory_usage for event in seen.events())
    assert most < down.numel() * 4


def test_bad_layouts_are_refused():
    x, into, down, offsets = torch.randn(5, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 3), ends((2, 3))
    with pytest.raises(ValueError, match="unknown save 'all'; known: pre_activation, none"):
        experts_mlp(x, into, down, offsets, save="all")
    with pytest.raises(ValueError, match="without a gate nothing is interleaved"):
        experts_mlp(x, into[:, :3], down, offsets, interleaved=True)
    with pytest.raises(ValueError, match=r"gate_up_bias must be \(2, 6\), got \(6,\)"):
        experts_mlp(x, into, down, offsets, gate_up_bias=torch.randn(6))
    with pytest.raises(ValueError, match=r"down_bias must be \(2, 4\), got a list of 1"):
        experts_mlp(x, into, down, offsets, down_bias=[torch.randn(2, 4)])
    with pytest.raises(ValueError, match=r"x must be \(R, 6\) and down_proj \(2, 6, F\) beside a gate_up_proj of"):
        experts_mlp(x, into, down, offsets, transposed=True)
