"""The grouped product and the gradient of a bank of csrc/cuda on the emulator, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import emulated

BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in BOUND]


def ends(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def spans(offsets: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """Where groups begin and end, as the kernels take offsets that lie: they do not decrease, nor pass the rows."""
    held = offsets.long().clamp(0, rows).cummax(0).values.tolist()
    return list(zip([0, *held], held, strict=False))


def product(x, weight, offsets, bias=None, row_index=None, transposed=False):
    x, weight = x.double(), weight.double()
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < len(x))
        x = torch.where(inside.unsqueeze(1), x[row_index.clamp(0, len(x) - 1)], 0.0)
    out = x.new_zeros(len(x), weight.shape[2 if transposed else 1])
    for group, (start, stop) in enumerate(spans(offsets, len(x))):
        out[start:stop] = x[start:stop] @ (weight[group] if transposed else weight[group].T)
        if bias is not None:
            out[start:stop] += bias[group].double()
    return out


def bank_gradient(grad, x, offsets):
    return torch.stack([grad[a:b].double().T @ x[a:b].double() for a, b in spans(offsets, len(x))])


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error; NaN never passes."""
    error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else float("inf")


def operands(dtype, sizes, depth, columns, transposed, beyond=3):
    rows, groups = sum(sizes) + beyond, len(sizes)
    shape = (groups, depth, columns) if transposed else (groups, columns, depth)
    return torch.randn(rows, depth).to(dtype), torch.randn(shape).to(dtype), torch.randn(groups, columns).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "depth", "columns"),
    [((5, 0, 37), 40, 24), ((130, 1, 66), 72, 136), ((3, 4), 17, 9), ((1,), 1, 1)],
    ids=["small", "several tiles", "odd", "one"],
)
def test_products_and_gradients_of_banks(ops, dtype, transposed, sizes, depth, columns):
    x, weight, bias = operands(dtype, sizes, depth, columns, transposed)
    offsets, index = ends(*sizes), torch.randint(0, len(x), (len(x),))
    found = ops.grouped_mm(x, weight, offsets, bias, None, transposed)
    assert distance(found, product(x, weight, offsets, bias, None, transposed)) <= BOUND[dtype]
    assert torch.equal(found[sum(sizes) :], torch.zeros(3, columns, dtype=dtype))
    found = ops.grouped_mm(x, weight, offsets, None, index, transposed)
    assert distance(found, product(x, weight, offsets, None, index, transposed)) <= BOUND[dtype]
    if not transposed:
        grad = torch.randn(len(x), columns).to(dtype)
        found = ops.grouped_wgrad(grad, x, offsets, None, index)
        assert distance(found, bank_gradient(grad, x[index], offsets)) <= BOUND[dtype]
        found = ops.grouped_wgrad(grad, x, offsets, index, None)
        assert distance(found, bank_gradient(grad[index], x, offsets)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_that_lie_otherwise_are_read_as_they_lie(ops, dtype):
    offsets, wide = ends(20, 6), torch.randn(26, 41).to(dtype)
    weight = torch.randn(2, 24, 33).to(dtype)
    for x in (wide[:, 1:34], wide[:, :33], wide[:1, :33].expand(26, -1), wide.T.contiguous().T[:, :33]):
        assert distance(ops.grouped_mm(x, weight, offsets), product(x, weight, offsets)) <= BOUND[dtype]
    x = wide[:, :33]
    for other in (weight.mT.contiguous().mT, weight[:1].expand(2, -1, -1), torch.randn(2, 24, 66).to(dtype)[..., ::2]):
        assert distance(ops.grouped_mm(x, other, offsets), product(x, other, offsets)) <= BOUND[dtype]
        turned = other.mT
        found = ops.grouped_mm(x, turned, offsets, None, None, True)
        assert distance(found, product(x, turned, offsets, transposed=True)) <= BOUND[dtype]


def test_many_groups_most_of_them_empty(ops):
    sizes = [0] * 77
    sizes[3], sizes[32], sizes[33], sizes[70] = 9, 40, 1, 5
    x, weight, _ = operands(torch.bfloat16, sizes, 24, 40, False)
    offsets = ends(*sizes)
    assert distance(ops.grouped_mm(x, weight, offsets), product(x, weight, offsets)) <= 4e-3
    grad = torch.randn(len(x), 40).to(torch.bfloat16)
    found = ops.grouped_wgrad(grad, x, offsets, None, None)
    assert distance(found, bank_gradient(grad, x, offsets)) <= 4e-3
    empty = torch.tensor(sizes) == 0
    assert torch.equal(found[empty], torch.zeros_like(found[empty]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_lies_in_rows_of_others_reaches_nobody(ops, dtype):
    x, weight, _ = operands(dtype, (5, 4), 24, 16, False)
    grad = torch.randn(12, 16).to(dtype)
    x[9:], grad[9:] = float("nan"), float("inf")
    offsets = ends(5, 4)
    found = ops.grouped_mm(x, weight, offsets)
    assert torch.equal(found[9:], torch.zeros(3, 16, dtype=dtype))
    assert found.isfinite().all()
    assert ops.grouped_wgrad(grad, x, offsets, None, None).isfinite().all()
    x[:5] = float("nan")
    assert ops.grouped_mm(x, weight, offsets)[5:].isfinite().all()
    assert ops.grouped_wgrad(torch.ones_like(grad), x, offsets, None, None)[1].isfinite().all()


@pytest.mark.parametrize("offsets", [(30, 40, 50), (9, 2, 12), (-5, 4, -1), (0, 0, 0)], ids=str)
def test_offsets_that_lie_are_clamped(ops, offsets):
    x, weight, bias = operands(torch.float32, (3, 4, 6), 8, 8, False, beyond=0)
    lying = torch.tensor(offsets, dtype=torch.int32)
    wanted = product(x, weight, lying, bias)
    torch.testing.assert_close(ops.grouped_mm(x, weight, lying, bias).double(), wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn(13, 8)
    found = ops.grouped_wgrad(grad, x, lying, None, None)
    torch.testing.assert_close(found.double(), bank_gradient(grad, x, lying), rtol=1e-5, atol=1e-5)


def test_an_index_outside_reads_a_row_of_zeros(ops):
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, _ = operands(dtype, (3, 4), 16, 8, False, beyond=0)
        index = torch.tensor([0, 6, 7, -1, 3, 10**12, 2])
        found = ops.grouped_mm(x, weight, ends(3, 4), None, index)
        assert distance(found, product(x, weight, ends(3, 4), None, index)) <= BOUND[dtype]
        assert torch.equal(found[[2, 3, 5]], torch.zeros(3, 8, dtype=dtype))


def test_nothing_gives_nothing(ops):
    none = torch.zeros(0, 8)
    assert ops.grouped_mm(none, torch.randn(2, 4, 8), ends(0, 0)).shape == (0, 4)
    assert torch.equal(ops.grouped_wgrad(none[:, :4], none, ends(0, 0), None, None), torch.zeros(2, 4, 8))
    assert torch.equal(ops.grouped_mm(torch.ones(3, 0), torch.randn(1, 4, 0), ends(3)), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_threads_changes_no_bit(ops, dtype):
    x, weight, bias = operands(dtype, (40, 0, 27), 72, 40, False)
    grad, offsets = torch.randn(len(x), 40).to(dtype), ends(40, 0, 27)
    found = []
    for order in emulated.ORDERS:
        with emulated.turns(order, seed=7):
            found.append((ops.grouped_mm(x, weight, offsets, bias), ops.grouped_wgrad(grad, x, offsets, None, None)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_metadata_tells_is_refused(ops):
    x, weight, offsets = torch.randn(4, 8), torch.randn(2, 3, 8), ends(2, 2)
    with pytest.raises(RuntimeError, match="x has 7 columns, the matrices are of 8"):
        ops.grouped_mm(x[:, :7], weight, offsets)
    with pytest.raises(RuntimeError, match="weight must have the dtype of x"):
        ops.grouped_mm(x, weight.double(), offsets)
    with pytest.raises(RuntimeError, match=r"offsets must be \(2,\) int32"):
        ops.grouped_mm(x, weight, offsets.long())
    with pytest.raises(RuntimeError, match=r"bias must be \(2, 3\)"):
        ops.grouped_mm(x, weight, offsets, torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="take float32, float64, bfloat16 and float16"):
        ops.grouped_mm(x.to(torch.complex64), weight.to(torch.complex64), offsets)
