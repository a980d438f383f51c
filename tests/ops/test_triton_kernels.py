"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter on a CPU.

The interpreter is chosen by ``TRITON_INTERPRET=1`` before Triton is imported, so ``test_triton.py`` runs this file in a
process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, CODES, GATED
from omnimoe.ops.triton import is_interpreted, missing_triton

if missing_triton():
    pytest.skip(f"{missing_triton()}; test_triton.py runs these in the interpreter", allow_module_level=True)

DEVICE = "cpu" if is_interpreted() else "cuda"
OPS = torch.ops.omnimoe_triton
# the interpreter rounds to bfloat16 towards zero, which doubles the error of each rounding
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2 if is_interpreted() else 8e-3, torch.float16: 2e-3}
SIZES = [(5, 0, 7, 3), (0, 0, 70), (0,)]


def ends(*sizes):
    return torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def index(count, below):
    return torch.randint(0, max(below, 1), (count,)).to(DEVICE)


def distance(found, wanted):
    """Relative Frobenius error, absolute where zeros are wanted; NaN never passes."""
    error = (found.double() - wanted).norm() / (wanted.norm() if wanted.norm() > 0 else 1.0)
    return error.item() if error.isfinite() else float("inf")


def in_groups(sizes):
    stop = 0
    for group, size in enumerate(sizes):
        start, stop = stop, stop + size
        yield group, slice(start, stop)


def product(x, weight, sizes, bias=None):
    """A matrix a group, past the last group zeros."""
    y = x.new_zeros(len(x), weight.shape[1])
    for group, rows in in_groups(sizes):
        part = x[rows] @ weight[group].t()
        y[rows] = part if bias is None else part + bias[group]
    return y


def network(x, w_in, w_out, weights, b_in, b_out, sizes, token_index, activation, *, interleaved):
    """What ``experts_mlp`` means."""
    tokens = torch.arange(len(x), device=x.device) if token_index is None else token_index
    z = product(x[tokens], w_in, sizes, b_in)
    if w_in.shape[1] == w_out.shape[2]:
        hidden = ACTIVATIONS[activation](z)
    else:
        hidden = GATED[activation](*((z[:, ::2], z[:, 1::2]) if interleaved else z.chunk(2, 1)))
    y = product(hidden, w_out, sizes, b_out)
    y = y if weights is None else y * weights[:, None]
    stop = sum(sizes)
    return torch.zeros_like(x).index_add(0, tokens[:stop], y[:stop])


@pytest.mark.parametrize(
    ("rows", "groups", "bits"), [(0, 3, 8), (1, 1, 8), (600, 5, 8), (270, 255, 8), (270, 256, 8), (300, 70, 3)]
)
def test_the_sort_is_stable_and_sentinels_come_last(rows, groups, bits, monkeypatch):
    from omnimoe.ops.triton import launch

    monkeypatch.setattr(launch, "DIGIT_BITS", bits)
    ids = torch.randint(-2, groups + 2, (rows,))
    ids[:1] = 2**40  # which as int32 would be group 0
    offsets, order, inverse = OPS.route_plan(ids.to(DEVICE), groups)
    keys = torch.where((ids >= 0) & (ids < groups), ids, groups)
    wanted = keys.sort(stable=True)
    assert torch.equal(order.cpu(), wanted.indices)
    assert torch.equal(inverse[order].cpu(), torch.arange(rows))
    assert torch.equal(offsets.cpu(), torch.searchsorted(wanted.values, torch.arange(groups), right=True).int())
    assert offsets.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_rows_are_copied_bit_by_bit(dtype):
    x = normal(9, 5, 3).to(dtype)
    if dtype.is_floating_point:
        x[2] = float("nan")
    taken, filled = index(20, 9), torch.rand(20).to(DEVICE) < 0.5
    for given in (None, filled):
        y = OPS.gather_rows(x, taken, given)
        wanted = x[taken] if given is None else x[taken].masked_fill(~filled[:, None, None], 0)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    assert OPS.gather_rows(x[:0], taken, None).eq(0).all()
    assert OPS.gather_rows(x, taken[:0], None).shape == (0, 5, 3)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_of_rows_are_taken_in_float32(dtype):
    y, order, weights = normal(12, 1100, dtype=dtype), torch.randperm(12).to(DEVICE), torch.rand(12).to(DEVICE)
    offsets = ends(3, 0, 5, 1)
    for given in (None, weights):
        rows = y.double() if given is None else y.double() * given.double()[:, None]
        wanted = torch.stack([rows[order[start:stop]].sum(0) for start, stop in ((0, 3), (3, 3), (3, 8), (8, 9))])
        assert distance(OPS.sum_rows(y, offsets, order, given), wanted) <= TOLERANCE[dtype] / 2
    assert OPS.sum_rows(y[:0], offsets * 0, order[:0], None).eq(0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_and_their_gradients(dtype, sizes):
    rows, groups = sum(sizes) + 2, len(sizes)
    x, weight, bias = normal(11, 70, dtype=dtype), normal(groups, 21, 70, dtype=dtype), normal(groups, 21, dtype=dtype)
    taken, grad = index(rows, 11), normal(rows, 21, dtype=dtype)
    given = [part.requires_grad_() for part in (x, weight, bias)]
    right = [part.detach().double().requires_grad_() for part in given]
    y = OPS.grouped_mm(x, weight, ends(*sizes), bias, taken)
    wanted = product(right[0][taken], right[1], sizes, right[2])
    y.backward(grad)
    wanted.backward(grad.double())
    assert y.dtype == dtype
    assert torch.equal(y[sum(sizes) :], torch.zeros_like(y[sum(sizes) :]))
    assert distance(y.detach(), wanted.detach()) <= TOLERANCE[dtype] / 2
    for part, other in zip(given, right, strict=True):
        assert distance(part.grad, other.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(33, 150, 64), (300, 40, 19), (40, 1, 1), (20, 16, 130)], ids=str)
def test_any_layout_and_width(shape):
    rows, columns, depth = shape
    sizes = (rows // 2, 0, rows - rows // 2)
    x, weight = normal(rows, 2 * depth)[:, ::2], normal(3, 2 * columns, depth)[:, ::2]
    wanted = product(x.double(), weight.double(), sizes)
    transposed = weight.transpose(1, 2).contiguous()
    for found in (
        OPS.grouped_mm(x, weight, ends(*sizes)),
        OPS.grouped_mm(x, transposed, ends(*sizes), transposed=True),
        OPS.grouped_mm(x, transposed.transpose(1, 2), ends(*sizes)),
        OPS.grouped_mm(x.contiguous(), torch.stack((weight, weight), -1)[..., 0], ends(*sizes)),
    ):
        assert distance(found, wanted) <= 2e-6


def test_the_gradient_of_a_bank_takes_rows_of_both_by_index():
    grad, x = normal(9, 17), normal(8, 30)
    of_grad, of_x = index(25, 9), index(25, 8)
    found = OPS.grouped_wgrad(grad, x, ends(4, 0, 20), of_grad, of_x)
    given = grad[of_grad].double(), x[of_x].double()
    wanted = torch.stack([given[0][rows].t() @ given[1][rows] for _, rows in in_groups((4, 0, 20))])
    assert distance(found, wanted) <= 2e-6
    assert found[1].eq(0).all()


def test_rows_past_the_end_may_hold_nan_and_leak_nothing():
    x = normal(8, 16)
    x[5:] = float("nan")
    weight, grad = normal(2, 8, 16), torch.full((8, 8), float("nan"), device=DEVICE)
    grad[:5] = 1
    x.requires_grad_(), weight.requires_grad_()
    y = OPS.grouped_mm(x, weight, ends(3, 2))
    y.backward(grad)
    for part in (y[5:], x.grad[5:]):
        assert torch.equal(part, torch.zeros_like(part))
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("offsets", [(3, 99), (-7, 4), (5, 2), (2**31 - 1, -(2**31))], ids=str)
def test_bad_offsets_are_put_right_and_read_nothing_outside(offsets):
    x, weight = normal(6, 16), normal(2, 8, 16)
    first = min(max(offsets[0], 0), 6)
    second = max(first, min(max(offsets[1], 0), 6))
    given = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    wanted = product(x.double(), weight.double(), (first, second - first))
    assert distance(OPS.grouped_mm(x, weight, given), wanted) <= 2e-6
    assert OPS.grouped_wgrad(normal(6, 8), x, given).isfinite().all()
    assert OPS.sum_rows(x, given, torch.arange(6, device=DEVICE), None).isfinite().all()
    far = torch.full((6,), 2**40, device=DEVICE)
    assert OPS.grouped_mm(x, weight, given, None, far).isfinite().all()
    assert OPS.gather_rows(x, -far, None).isfinite().all()


SMALL, LARGE = ((5, 0, 7, 3), 19, 9), ((5, 0, 40), 70, 40)
CASES = [  # activation, gated, routed, interleaved, with biases, dtype, sizes with widths
    *((name, True, True, False, True, torch.float32, SMALL) for name in GATED),
    *((name, False, True, False, False, torch.float32, SMALL) for name in ACTIVATIONS),
    ("silu", True, False, True, True, torch.float32, SMALL),
    ("gelu", False, False, False, True, torch.float16, SMALL),
    ("clamped_silu", True, True, True, True, torch.bfloat16, SMALL),
    ("silu", True, True, False, False, torch.bfloat16, LARGE),
    ("silu", True, True, True, True, torch.float32, LARGE),
]


@pytest.mark.parametrize(("activation", "gated", "routed", "interleaved", "with_bias", "dtype", "shape"), CASES)
def test_the_network_and_its_gradients(activation, gated, routed, interleaved, with_bias, dtype, shape):
    (sizes, hidden, width), tokens = shape, 11
    rows, groups = sum(sizes) + 2, len(sizes)
    wide = 2 * width if gated else width
    given = [
        normal(tokens if routed else rows, hidden, dtype=dtype),
        normal(groups, wide, hidden, dtype=dtype, scale=2 / hidden**0.5),
        normal(groups, hidden, width, dtype=dtype, scale=1 / width**0.5),
        torch.rand(rows).to(DEVICE) if with_bias or routed else None,
        normal(groups, wide, dtype=dtype) if with_bias else None,
        normal(groups, hidden, dtype=dtype) if with_bias else None,
    ]
    right = [None if part is None else part.double().requires_grad_() for part in given]
    for part in given:
        part is None or part.requires_grad_()
    token_index = index(rows, tokens) if routed else None
    x, w_in, w_out, weights, b_in, b_out = given
    more = (CODES[activation], interleaved)
    y, z = OPS.experts_mlp(x, w_in, w_out, ends(*sizes), token_index, weights, b_in, b_out, *more, True)
    wanted = network(*right, sizes, token_index, activation, interleaved=interleaved)
    grad = normal(*y.shape, dtype=dtype)
    y.backward(grad)
    wanted.backward(grad.double())
    assert z.shape == (rows, wide)
    assert distance(y.detach(), wanted.detach()) <= TOLERANCE[dtype]
    for part, other in zip(given, right, strict=True):
        if part is not None:
            assert part.grad.dtype == part.dtype
            assert distance(part.grad, other.grad) <= TOLERANCE[dtype]


def operands(sizes=(3, 0, 4), tokens=5, hidden=8, width=6):
    rows, groups = sum(sizes), len(sizes)
    return [
        normal(tokens, hidden), normal(groups, 2 * width, hidden), normal(groups, hidden, width), ends(*sizes),
        index(rows, tokens), torch.rand(rows).to(DEVICE), normal(groups, 2 * width), normal(groups, hidden), 0, False,
    ]  # fmt: skip


def learned(given):
    return [part.requires_grad_() for part in given if isinstance(part, torch.Tensor) and part.is_floating_point()]


def test_a_row_past_the_end_with_nan_in_token_weight_or_gradient_leaks_nothing():
    given = operands()
    given[3] = ends(2, 0, 2)  # the last three rows are of no group
    given[4] = torch.tensor([0, 1, 1, 2, 4, 4, 3], device=DEVICE)
    given[0][4] = float("nan")
    given[5][4:] = float("nan")
    parts = learned(given)
    y, z = OPS.experts_mlp(*given, True)
    assert y.isfinite().all()
    assert torch.equal(y[3:], torch.zeros_like(y[3:]))
    assert torch.equal(z[4:], torch.zeros_like(z[4:]))
    grad = torch.ones_like(y)
    grad[3:] = float("nan")
    y.backward(grad)
    for part in parts:
        assert part.grad.isfinite().all()
    assert parts[3].grad[4:].eq(0).all()


def test_pre_activations_that_were_not_kept_are_made_again_and_only_the_input_is_saved():
    given = operands()
    parts = learned(given)
    parameters = {part.data_ptr() for part in parts[1:3]}
    results, kept = [], []

    def pack(tensor):
        if tensor.is_floating_point() and tensor.data_ptr() not in parameters:
            kept[-1].append(tuple(tensor.shape))
        return tensor

    for keep in (True, False):
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, z = OPS.experts_mlp(*given, keep)
        results.append([y, *torch.autograd.grad(y.square().sum(), parts)])
        assert z.shape == (7 if keep else 0, 12)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    rest = [(5, 8), (7,), (3, 12), (3, 8)]  # input, weights, biases
    assert sorted(kept[0]) == sorted([*rest, (7, 12)])
    assert sorted(kept[1]) == sorted(rest)


def test_a_batch_without_tokens_and_a_bank_without_rows_have_gradients():
    for sizes, tokens in (((0, 0), 0), ((0, 0), 3)):
        given = operands(sizes, tokens)
        parts = learned(given)
        y, _ = OPS.experts_mlp(*given, True)
        y.sum().backward()
        assert y.shape == (tokens, 8)
        for part in parts:
            assert torch.equal(part.grad, torch.zeros_like(part))
    x, weight = normal(0, 8), normal(2, 4, 8).requires_grad_()
    OPS.grouped_mm(x, weight, ends(0, 0)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_same_twice_is_the_same_bit_by_bit():
    given = operands((40, 3, 0, 21), 9, 40, 30)
    parts = learned(given)
    results = []
    for _ in range(2):
        y, _ = OPS.experts_mlp(*given, True)
        results.append([y, *torch.autograd.grad(y.square().sum(), parts)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_operands_that_a_kernel_would_misread_are_refused():
    x, weight, offsets = normal(6, 16), normal(2, 8, 16), ends(3, 3)
    for given, message in [
        ((x.double(), weight.double(), offsets), "take torch.float32"),
        ((x, weight.half(), offsets), "weight must be torch.float32"),
        ((x, weight, offsets.long()), "offsets must be torch.int32"),
        ((x, weight, offsets, None, index(6, 6).int()), "row_index must be torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            OPS.grouped_mm(*given)


def test_opcheck():
    given = operands((2, 0, 1), 3, 5, 4)
    _, z = OPS.experts_mlp(*given, True)
    plain = (given[0].clone(), z, *given[1:])
    without_gradient = {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(OPS.experts_mlp_backward.default, (plain[0], *plain), **without_gradient)
    opcheck(OPS.route_plan.default, (given[4], 3), **without_gradient)
    opcheck(OPS.sum_rows.default, (normal(3, 4).requires_grad_(), ends(1, 2), index(3, 1), given[5]))
    opcheck(OPS.gather_rows.default, (normal(3, 4).requires_grad_(), index(3, 3), None))
    opcheck(OPS.grouped_wgrad.default, (normal(3, 4), normal(3, 5), ends(1, 2), None, None))
    learned(given)
    opcheck(OPS.experts_mlp.default, (*given, True))
    opcheck(OPS.grouped_mm.default, (given[0], given[2], ends(1, 0, 2), given[7][:, :4], index(3, 3), True))


def test_it_compiles_into_one_graph_of_any_size():
    torch._dynamo.reset()
    call = torch.compile(lambda *given: OPS.experts_mlp(*given, True)[0] * 2, fullgraph=True, dynamic=True,
                         backend="aot_eager")  # fmt: skip
    for sizes, tokens in (((3, 0, 4), 5), ((1, 6, 9), 12)):
        given = operands(sizes, tokens)
        parts = learned(given)
        wanted = 2 * OPS.experts_mlp(*given, True)[0]
        found = call(*given)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(torch.autograd.grad(found.sum(), parts), torch.autograd.grad(wanted.sum(), parts),
                              strict=True):  # fmt: skip
            torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_read_by_the_host_and_a_graph_can_be_captured():
    given = operands((40, 3, 0, 21), 9, 40, 30)
    wanted = OPS.experts_mlp(*given, True)[0].clone()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS.experts_mlp(*given, True)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = OPS.experts_mlp(*given, True)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
