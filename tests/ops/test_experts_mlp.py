"""The networks of a bank, routed and not: every backend, activation and dtype against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import ACTIVATIONS, GATED, backend, experts_mlp

PLAIN = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp_min(0),
    "relu2": lambda x: x.clamp_min(0) ** 2,
}
WITH_GATE = {name: lambda gate, up, name=name: PLAIN[name](gate) * up for name in PLAIN}
WITH_GATE["clamped_silu"] = lambda gate, up: (
    gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)) * (up.clamp(-7, 7) + 1)
)
BACKENDS = ["reference", "torch", "cpp"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@pytest.fixture(params=BACKENDS)
def through(request):
    """Runs the test within one backend."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    with backend(request.param):
        yield request.param


def test_every_activation_is_known_here():
    assert set(PLAIN) == set(ACTIVATIONS)
    assert set(WITH_GATE) == set(GATED)


def loop(x, into, down, sizes, activation, token_index=None, weights=None):
    """A row after the other, in plain Python: what the op means."""
    width = down.shape[2]
    tokens = list(range(len(x))) if token_index is None else token_index.tolist()
    out, row = torch.zeros_like(x), 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            hidden = into[group] @ x[tokens[row]]
            if len(hidden) == width:
                hidden = PLAIN[activation](hidden)
            else:
                hidden = WITH_GATE[activation](hidden[:width], hidden[width:])
            y = down[group] @ hidden * (1 if weights is None else weights[row])
            out = out.index_add(0, torch.tensor([tokens[row]]), y[None])
            row += 1
    return out


def ends(sizes):
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def drawn(sizes, tokens, hidden, width, *, gated=True, routed=True, beyond=0, dtype=torch.float64, seed=0):
    """Operands that need gradients, in ``dtype``, and the same in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    rows = sum(sizes) + beyond
    operands = [
        normal(tokens if routed else rows, hidden),
        normal(len(sizes), (2 if gated else 1) * width, hidden, scale=2 / hidden**0.5),
        normal(len(sizes), hidden, width, scale=1 / width**0.5),
    ]
    operands = [part.to(dtype) for part in operands]
    token_index = torch.randint(0, tokens, (rows,), generator=generator) if routed else None
    weights = torch.rand(rows, generator=generator).to(torch.promote_types(dtype, torch.float32)) if routed else None
    everything = [*operands, weights]
    return (
        [None if part is None else part.clone().requires_grad_() for part in everything],
        [None if part is None else part.double().requires_grad_() for part in everything],
        token_index,
    )


def check(sizes, activation, tolerance, **shape):
    given_, wanted_, token_index = drawn(sizes, **shape)
    y = experts_mlp(*given_[:3], ends(sizes), activation, token_index, given_[3])
    wanted = loop(*wanted_[:3], sizes, activation, token_index, wanted_[3])
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(grad)
    if wanted.requires_grad:
        wanted.backward(grad.double())
    assert y.dtype == given_[0].dtype
    for found, right in zip(
        [y, *(part.grad for part in given_ if part is not None)],
        [wanted, *(part.grad for part in wanted_ if part is not None)],
        strict=True,
    ):
        right = torch.zeros_like(found, dtype=torch.float64) if right is None else right
        assert found.isfinite().all()
        assert (found.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("activation", WITH_GATE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routed", [True, False])
def test_values_and_gradients_are_those_of_a_loop_over_rows(through, activation, dtype, routed):
    shape = {"tokens": 11, "hidden": 19, "width": 21, "routed": routed, "beyond": 2, "dtype": dtype}
    check((5, 0, 7, 3), activation, TOLERANCE[dtype], **shape)
    if activation in PLAIN:
        check((5, 0, 7, 3), activation, TOLERANCE[dtype], gated=False, **shape)


@pytest.mark.parametrize("sizes", [(40, 1, 0, 9), (0, 0, 3), (64,), (0,), (13, 14)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "width"), [(64, 48), (33, 70), (1, 1), (130, 16)])
def test_any_number_of_rows_and_any_width(through, sizes, dtype, hidden, width):
    if hidden == 1:
        dtype = torch.float32  # the roundings of single numbers do not average out
    check(sizes, "silu", TOLERANCE[dtype], tokens=17, hidden=hidden, width=width, dtype=dtype)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9),
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 70),
    width=st.integers(1, 70),
    gated=st.booleans(),
    routed=st.booleans(),
    beyond=st.integers(0, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_compiled_kernels_at_drawn_shapes(compiled, sizes, dtype, **shape):
    with backend("cpp"):
        check(sizes, "silu", TOLERANCE[dtype], dtype=dtype, **shape)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("routed", [True, False])
def test_gradcheck(through, gated, routed):
    operands, _, token_index = drawn((2, 0, 3), 4, 3, 4, gated=gated, routed=routed)
    offsets = ends((2, 0, 3))
    given_ = [part for part in operands if part is not None]
    assert torch.autograd.gradcheck(
        lambda *parts: experts_mlp(*parts[:3], offsets, "silu", token_index, *parts[3:]), given_
    )


def test_one_group_equals_a_plain_swiglu_layer_bit_for_bit():
    x, into, down = torch.randn(6, 8), torch.randn(24, 8), torch.randn(8, 12)
    gate, up = F.linear(x, into).chunk(2, dim=-1)
    y = experts_mlp(x, into[None], down[None], torch.tensor([6], dtype=torch.int32))
    assert torch.equal(y, F.linear(F.silu(gate) * up, down))


def test_a_token_that_nobody_takes_is_zero_and_rows_past_the_end_leak_nothing(through):
    x, into, down = torch.randn(4, 8), torch.randn(2, 12, 8), torch.randn(2, 8, 6)
    x[3] = float("nan")
    x.requires_grad_()
    weights = torch.ones(3, requires_grad=True)
    token_index = torch.tensor([0, 1, 3])
    y = experts_mlp(x, into, down, torch.tensor([1, 2], dtype=torch.int32), "silu", token_index, weights)
    if through != "cpp":  # the composed form multiplies by the zero rows of what it did not compute
        y = y[:3]
    assert torch.equal(y[2:], torch.zeros_like(y[2:]))
    y[:2].sum().backward()
    assert x.grad[:3].isfinite().all()
    assert weights.grad[:2].abs().min() > 0
    assert weights.grad[2] == 0


def test_without_gradients_nothing_is_kept(compiled):
    (x, into, down, weights), _, token_index = drawn((3, 2), 4, 8, 6, dtype=torch.float32)
    with torch.no_grad():
        given_ = (x, into, down, ends((3, 2)), token_index, weights, None, None, 0, False)
        out, z = torch.ops.omnimoe.experts_mlp(*given_, False)
        again, kept = torch.ops.omnimoe.experts_mlp(*given_, True)
    assert z.numel() == 0
    assert kept.shape == (5, 12)
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(compiled, dtype):
    operands, _, token_index = drawn((70, 3, 0, 41), 40, 96, 80, dtype=dtype)

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with backend("cpp"):
                y = experts_mlp(*operands[:3], ends((70, 3, 0, 41)), "silu", token_index, operands[3])
            return [y, *torch.autograd.grad(y.float().square().sum(), operands)]
        finally:
            torch.set_num_threads(before)

    for one, two in zip(results(1), results(3), strict=True):
        assert torch.equal(one, two)


def test_under_autocast_it_computes_in_bfloat16_and_gives_gradients_in_float32(through):
    operands, wanted_, token_index = drawn((5, 4), 6, 16, 24, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts_mlp(*operands[:3], ends((5, 4)), "silu", token_index, operands[3])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {part.grad.dtype for part in operands} == {torch.float32}
    wanted = loop(*wanted_[:3], (5, 4), "silu", token_index, wanted_[3])
    assert (y.double() - wanted).norm() <= 2e-2 * wanted.norm()


def test_it_compiles_into_one_graph_of_any_size(compiled):
    torch._dynamo.reset()
    call = torch.compile(
        lambda x, into, down, offsets, index, weights: experts_mlp(x, into, down, offsets, "silu", index, weights) * 2,
        fullgraph=True,
        dynamic=True,
    )
    for sizes, tokens in (((3, 0, 4), 5), ((1, 6, 9), 12)):
        operands, wanted_, token_index = drawn(sizes, tokens, 8, 6, dtype=torch.float32)
        y = call(*operands[:3], ends(sizes), token_index, operands[3])
        wanted = 2 * loop(*wanted_[:3], sizes, "silu", token_index, wanted_[3])
        torch.testing.assert_close(y, wanted.float())
        y.sum().backward()
        assert operands[1].grad.isfinite().all()


def test_bad_operands_are_refused(through):
    x, offsets = torch.randn(2, 4), torch.tensor([2], dtype=torch.int32)
    into, down = torch.randn(1, 10, 4), torch.randn(1, 4, 5)
    with pytest.raises(ValueError, match="gate_up_proj must be \\(G, 10, D\\)"):
        experts_mlp(x, torch.randn(1, 7, 4), down, offsets)
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: silu"):
        experts_mlp(x, into, down, offsets, "swish")
    with pytest.raises(ValueError, match="unknown activation 'clamped_silu' without a gate; known: silu"):
        experts_mlp(x, torch.randn(1, 5, 4), down, offsets, "clamped_silu")
    with pytest.raises(ValueError, match="weights must be \\(2,\\), one a row, got \\(3,\\)"):
        experts_mlp(x, into, down, offsets, "silu", torch.tensor([0, 1]), torch.ones(3))
    if through == "reference":
        return  # it never reads offsets on the host
    with pytest.raises(ValueError, match="offsets must not decrease nor pass the 2 rows, got \\[3\\]"):
        experts_mlp(x, into, down, torch.tensor([3], dtype=torch.int32))


def test_the_compiled_op_itself_never_reads_outside_of_its_operands(compiled):
    (x, into, down, weights), _, token_index = drawn((3, 2), 4, 8, 6, dtype=torch.float32)
    op, offsets = torch.ops.omnimoe.experts_mlp, ends((3, 2))
    wrong = [
        (x, into, down, ends((3, 9)), token_index, weights, "offsets must not decrease nor pass the 5 rows"),
        (x, into, down, offsets.long(), token_index, weights, "int32"),
        (x, into, down, offsets, token_index + 2, weights, "is not within the 4 rows"),
        (x, into, down, offsets, token_index.int(), weights, "int64"),
        (x, into, down, offsets, token_index, weights[:2], "weights must be"),
        (x, into, down, offsets, token_index, weights.double(), "float32"),
        (x, into[:, :, :5], down, offsets, token_index, weights, "w_in must be"),
        (x, into[:1], down, offsets, token_index, weights, "w_in must be"),
        (x, into.double(), down, offsets, token_index, weights, "w_in must have the dtype of x"),
        (x.int(), into.int(), down.int(), offsets, token_index, weights, "take float32"),
    ]
    for *operands, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*(part.detach() for part in operands), None, None, 0, False, True)
    with pytest.raises(RuntimeError, match="unknown activation 9"):
        op(x, into, down, offsets, token_index, weights, None, None, 9, False, True)
