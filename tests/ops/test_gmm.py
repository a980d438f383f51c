"""The surface of ``grouped_gemm``: what its own tests and its users' call sites ask of it, on ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from omnimoe.ops import gmm as grouped_gemm

SIZES = [(1, 16, 16, 16), (8, 16, 16, 16), (16, 8, 24, 16), (1, 12, 32, 48), (8, 12, 32, 48), (5, 3, 7, 9)]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 2e-6}


def loop(a, b, batch_sizes, trans_b=False):
    """One product a group."""
    parts = a.split(batch_sizes.tolist())
    return torch.cat([part @ (one.t() if trans_b else one) for part, one in zip(parts, b, strict=True)])


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else float("inf")


def uneven(groups: int, rows: int) -> torch.Tensor:
    """Sizes by drawn shares; what is left falls to the last group."""
    share = torch.rand(groups)
    sizes = (share / share.sum() * rows).long()
    sizes[-1] += groups * rows - sizes.sum()
    return sizes


@pytest.mark.parametrize(("groups", "rows", "depth", "width"), SIZES)
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_values_and_gradients_are_those_of_a_loop(groups, rows, depth, width, trans_b, dtype, even):
    batch_sizes = torch.full((groups,), rows) if even else uneven(groups, rows)
    a = torch.randn(groups * rows, depth).to(dtype).requires_grad_()
    b = torch.randn(groups, *((width, depth) if trans_b else (depth, width))).to(dtype).requires_grad_()
    exact = [part.detach().double().requires_grad_() for part in (a, b)]
    out = grouped_gemm.ops.gmm(a, b, batch_sizes, trans_b)
    wanted = loop(*exact, batch_sizes, trans_b)
    out.sum().backward()  # a gradient without strides
    wanted.sum().backward()
    assert out.dtype == dtype
    for found, right in zip((out, a.grad, b.grad), (wanted, exact[0].grad, exact[1].grad), strict=True):
        assert distance(found, right) <= TOLERANCE[dtype]


@pytest.mark.parametrize("trans_b", [False, True])
def test_gradcheck(trans_b):
    a = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, *((4, 3) if trans_b else (3, 4)), dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([2, 0, 4])
    assert torch.autograd.gradcheck(lambda a, b: grouped_gemm.ops.gmm(a, b, sizes, trans_b), (a, b))


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_the_gradient_of_a_bank_is_the_form_with_a_transposed(kind):
    a, b, sizes = torch.randn(7, 4), torch.randn(7, 6), torch.tensor([3, 0, 4], dtype=kind)
    found = grouped_gemm.backend.gmm(a, b, sizes, trans_a=True)
    torch.testing.assert_close(found, torch.stack([a[:3].t() @ b[:3], torch.zeros(4, 6), a[3:].t() @ b[3:]]))


def test_a_result_goes_where_it_is_wanted():
    a, b, sizes = torch.randn(5, 4), torch.randn(2, 4, 3), torch.tensor([2, 3])
    wanted, place = grouped_gemm.backend.gmm(a, b, sizes), torch.full((5, 3), float("nan"))
    assert grouped_gemm.backend.gmm(a, b, sizes, c=place) is place
    assert torch.equal(place, wanted)
    bank = torch.full((2, 4, 3), float("nan"))
    assert grouped_gemm.backend.gmm(a, wanted, sizes, trans_a=True, c=bank) is bank
    assert bank.isfinite().all()


def test_rows_past_the_sizes_are_zero_and_no_rows_are_no_error():
    a, b = torch.full((5, 4), float("nan")), torch.randn(2, 4, 3)
    a[:2] = 1
    y = grouped_gemm.ops.gmm(a, b, torch.tensor([2, 0]))
    assert y[:2].isfinite().all()
    assert torch.equal(y[2:], torch.zeros(3, 3))
    empty = torch.zeros(0, 4, requires_grad=True)
    bank = b.requires_grad_()
    grouped_gemm.ops.gmm(empty, bank, torch.tensor([0, 0])).sum().backward()
    assert torch.equal(bank.grad, torch.zeros_like(b))


@pytest.mark.parametrize(
    ("a", "b", "sizes", "options", "message"),
    [
        ((5, 4), (2, 4, 3), [2, 3], {"trans_a": True, "trans_b": True}, "transposes a or b, not both"),
        ((5, 4), (2, 4, 3), [[2, 3]], {}, "batch_sizes must be (G,) int64, got (1, 2)"),
        ((5, 4), (2, 4, 3), [2.0, 3.0], {}, "batch_sizes must be (G,) int64"),
        ((5, 4), (5, 3), [2, 3], {}, "a and b must be (R, K) and three-dimensional"),
        ((5, 4), (2, 4, 3), [2, 3], {"trans_a": True}, "a and b must be (R, K) and (R, N)"),
        ((5, 4), (2, 4, 3), [2, 3], {"c": torch.zeros(5, 4)}, "c must be (5, 3), got (5, 4)"),
        ((5, 4), (2, 4, 3), [2, 4], {}, "offsets must not decrease nor pass the 5 rows"),
        ((5, 4), (2, 4, 3), [6, -1], {}, "offsets must not decrease nor pass the 5 rows"),
    ],
)
def test_what_does_not_fit_is_refused(a, b, sizes, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        grouped_gemm.backend.gmm(torch.randn(a), torch.randn(b), torch.tensor(sizes), **options)
    assert message in str(caught.value)


class KeepsLittle(torch.autograd.Function):
    """A network of experts as MegaBlocks' memory-optimised one calls the package: by hand, into buffers of its own."""

    @staticmethod
    def forward(ctx, x, w1, w2, sizes):
        hidden = grouped_gemm.backend.gmm(x, w1, sizes, trans_b=True)
        ctx.save_for_backward(x, w1, w2, sizes, hidden)
        return grouped_gemm.backend.gmm(F.gelu(hidden), w2, sizes)

    @staticmethod
    def backward(ctx, grad):
        x, w1, w2, sizes, hidden = ctx.saved_tensors
        with torch.enable_grad():
            kept = hidden.detach().requires_grad_()
            activated = F.gelu(kept)
        grad_w2 = grouped_gemm.backend.gmm(activated.detach(), grad, sizes, trans_a=True)
        grad_activated = grouped_gemm.backend.gmm(grad, w2, sizes, trans_b=True)
        (grad_hidden,) = torch.autograd.grad(activated, kept, grad_activated)
        grad_w1 = grouped_gemm.backend.gmm(grad_hidden, x, sizes, trans_a=True)
        grouped_gemm.backend.gmm(grad_hidden, w1, sizes, c=grad)
        return grad.clone(), grad_w1, grad_w2, None


def test_a_network_written_for_megablocks_runs():
    given = [torch.randn(*size, dtype=torch.float64).requires_grad_() for size in ((9, 4), (3, 6, 4), (3, 6, 4))]
    sizes = torch.tensor([4, 0, 5])
    found = KeepsLittle.apply(*given, sizes)
    wanted = loop(F.gelu(loop(given[0], given[1], sizes, True)), given[2], sizes)
    grad = torch.randn_like(found)
    one, other = (torch.autograd.grad(y, given, grad.clone(), retain_graph=True) for y in (found, wanted))
    torch.testing.assert_close([found, *one], [wanted, *other])


CHOSEN = torch.tensor([[1, 2], [0, 1], [0, 2], [1, 2]])


def test_permute_sorts_by_expert_and_unpermute_undoes_it():
    x = torch.arange(4.0)[:, None].expand(4, 3).contiguous()
    rows, row_id_map = grouped_gemm.ops.permute(x, CHOSEN.int())
    assert rows[:, 0].tolist() == [1, 2, 0, 1, 3, 0, 2, 3]
    assert row_id_map.tolist() == [2, 0, 1, 4, 5, 3, 6, 7]  # first choices of the tokens, then second ones
    assert row_id_map.dtype == torch.int32
    probs = torch.tensor([[0.25, 0.75]]).expand(4, 2)
    torch.testing.assert_close(grouped_gemm.unpermute(rows, row_id_map, probs), x)


def test_a_single_choice_needs_no_weights():
    x, chosen = torch.randn(5, 3), torch.tensor([2, 0, 1, 0, 2])
    rows, row_id_map = grouped_gemm.permute(x, chosen, max_token_num=100)
    assert torch.equal(rows, x[[1, 3, 2, 0, 4]])
    assert torch.equal(grouped_gemm.ops.unpermute(rows, row_id_map), x)


def test_rows_beyond_the_wanted_number_are_left_out():
    x, probs = torch.randn(4, 3), torch.rand(4, 2)
    rows, row_id_map = grouped_gemm.ops.permute(x, CHOSEN, num_out_tokens=5)
    assert torch.equal(rows, x[[1, 2, 0, 1, 3]])
    assert row_id_map.tolist() == [2, 0, 1, 4, -1, 3, -1, -1]
    y = grouped_gemm.ops.unpermute(rows, row_id_map, probs)
    kept = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(y, x * (probs * kept).sum(1, keepdim=True))


def test_a_negative_choice_comes_last():
    rows, row_id_map = grouped_gemm.ops.permute(torch.arange(3.0)[:, None], torch.tensor([[1, -1], [0, 1], [-1, 0]]))
    assert rows[:4, 0].tolist() == [1, 2, 0, 1]
    assert row_id_map.tolist() == [2, 0, 5, 4, 3, 1]


def test_gradients_of_the_copies():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, probs):
        rows, row_id_map = grouped_gemm.ops.permute(x, CHOSEN, num_out_tokens=7)
        return rows, grouped_gemm.ops.unpermute(rows.square(), row_id_map, probs)

    assert torch.autograd.gradcheck(there_and_back, (x, probs))


def test_no_tokens_are_no_error():
    rows, row_id_map = grouped_gemm.ops.permute(torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.int32))
    assert rows.shape == (0, 3)
    assert grouped_gemm.ops.unpermute(rows, row_id_map, torch.zeros(0, 2)).shape == (0, 3)


def test_copies_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="indices must be"):
        grouped_gemm.ops.permute(torch.zeros(3, 2), torch.zeros(2, 2).int())
    with pytest.raises(ValueError, match="probs must be"):
        grouped_gemm.ops.unpermute(torch.zeros(4, 2), torch.arange(4), torch.ones(3, 2))


def test_it_stands_in_for_the_package_by_name():
    code = """
import sys, torch, omnimoe.ops.gmm
sys.modules["grouped_gemm"] = omnimoe.ops.gmm
import grouped_gemm
from grouped_gemm.ops import gmm, permute, unpermute
from grouped_gemm import backend
y = gmm(torch.ones(3, 2), torch.ones(2, 2, 4), torch.tensor([1, 2]), trans_b=False)
assert torch.equal(y, backend.gmm(torch.ones(3, 2), torch.ones(2, 2, 4), torch.tensor([1, 2])))
assert grouped_gemm.ops is not None and y.shape == (3, 4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_sizes_on_the_device_are_not_read_back():
    a, b = torch.randn(6, 16, device="cuda").bfloat16(), torch.randn(2, 16, 8, device="cuda").bfloat16()
    sizes = torch.tensor([4, 2], device="cuda")
    grouped_gemm.ops.gmm(a, b, sizes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = grouped_gemm.ops.gmm(a, b, sizes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert distance(y.cpu(), loop(a.double().cpu(), b.double().cpu(), sizes.cpu())) < 1e-2
