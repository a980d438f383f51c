"""The scan against a loop over time: values, gradients, states, places where it forgets."""

from __future__ import annotations

import pytest
import torch

import omnimoe
from omnimoe.ops import BackendError, selective_scan
from omnimoe.ops.selective_scan import chunked, reference

BACKENDS = ("cpp", "torch")


def operands(
    length: int, *, dtype: torch.dtype = torch.float64, batch_size: int = 2, channels: int = 5, size: int = 3
) -> list[torch.Tensor]:
    """x, step, rate, into, out and a state."""
    torch.manual_seed(length)
    x, step = (torch.randn(batch_size, length, channels, dtype=dtype) for _ in range(2))
    rate = -torch.rand(channels, size, dtype=dtype) - 0.1
    into, out = (torch.randn(batch_size, length, size, dtype=dtype) for _ in range(2))
    return [x, step.exp(), rate, into, out, torch.randn(batch_size, channels, size, dtype=dtype)]


def gradients(backend: str, given: list[torch.Tensor], starts: torch.Tensor | None) -> list[torch.Tensor]:
    leaves = [part.clone().requires_grad_() for part in given]
    with omnimoe.backend(backend):
        y, last = selective_scan(*leaves, starts)
    loss = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).sum() + (last**2).sum()
    loss.backward()
    return [y.detach(), last.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 7, chunked.CHUNK["cpu"], 2 * chunked.CHUNK["cpu"] + 5])
@pytest.mark.parametrize("forgets", [False, True])
def test_chunks_match_the_loop(compiled, backend, length, forgets):
    given = operands(length)
    starts = torch.rand(2, length) < 0.1 if forgets else None
    for found, wanted in zip(gradients(backend, given, starts), gradients("reference", given, starts), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (16, 16), (33, 7), (300, 4)])
def test_the_kernel_at_any_width(compiled, channels, size):
    given = operands(70, dtype=torch.float32, channels=channels, size=size)
    starts = torch.rand(2, 70) < 0.1
    wanted = gradients("reference", [part.double() for part in given], starts)
    for found, exact in zip(gradients("cpp", given, starts), wanted, strict=True):
        assert (found - exact).norm() <= 2e-6 * exact.norm()


def test_the_kernel_repeats_to_the_bit_with_any_threads(compiled):
    given, threads, found = operands(70, dtype=torch.float32, channels=300), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients("cpp", given, None))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("length", [5, chunked.SPAN, 5 * chunked.SPAN + 3])
def test_spans_match_positions(length):
    decay, driven, state = torch.rand(length, 2, 3), torch.randn(length, 2, 3), torch.randn(2, 3)
    wanted = chunked.by_position(decay, driven.clone(), state)
    torch.testing.assert_close(chunked.by_span(decay, driven.clone(), state), wanted)


def test_in_pieces_through_the_state():
    *given, state = operands(20)
    x, step, rate, into, out = given
    y, last = selective_scan(x, step, rate, into, out, state)
    parts = []
    for first, stop in ((0, 1), (1, 12), (12, 20)):
        cut = [part[:, first:stop] for part in (x, step, into, out)]
        part, state = selective_scan(cut[0], cut[1], rate, cut[2], cut[3], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), y)
    torch.testing.assert_close(state, last)


def test_a_start_forgets_what_came_before():
    x, step, rate, into, out, state = operands(9)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[:, 4] = True
    found, _ = selective_scan(x, step, rate, into, out, state, starts)
    wanted, _ = selective_scan(x[:, 4:], step[:, 4:], rate, into[:, 4:], out[:, 4:])
    torch.testing.assert_close(found[:, 4:], wanted)


def test_a_step_of_zero_keeps_the_state():
    x, step, rate, into, out, state = operands(6)
    torch.testing.assert_close(selective_scan(x, 0 * step, rate, into, out, state)[1], state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_differences(compiled, backend):
    given = [part.requires_grad_() for part in operands(4, batch_size=1)]
    with omnimoe.backend(backend):
        assert torch.autograd.gradcheck(selective_scan, given)


def test_the_contract_of_the_chunks():
    given = [part.requires_grad_() for part in operands(3)]
    torch.library.opcheck(torch.ops.omnimoe.chunked_scan.default, (*given, None))


def test_shapes_foretold_past_one_chunk_and_one_group_of_channels(compiled):
    given = operands(70, dtype=torch.float32, channels=300)
    op = torch.ops.omnimoe.selective_scan
    torch.library.opcheck(op.default, (*given, None), test_utils="test_faketensor")
    y, last, kept = op(*given, None)
    asked = (torch.ones_like(y), torch.ones_like(last), *given[:5], None, kept)
    torch.library.opcheck(torch.ops.omnimoe.selective_scan_backward.default, asked, test_utils="test_faketensor")


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_sums_in_float32(compiled, backend):
    *given, state = operands(30, dtype=torch.float32)
    wanted, _ = reference.selective_scan(*given, state, None)
    with omnimoe.backend(backend):
        found, last = selective_scan(*(part.bfloat16() for part in given), state)
    assert (found.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_empty_sequence_keeps_the_state(compiled, backend):
    *given, state = operands(3)
    x, step, rate, into, out = given
    with omnimoe.backend(backend):
        y, last = selective_scan(x[:, :0], step[:, :0], rate, into[:, :0], out[:, :0], state.requires_grad_())
    assert y.shape == (2, 0, 5)
    torch.testing.assert_close(last, state)
    last.sum().backward()
    assert torch.equal(state.grad, torch.ones_like(state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(compiled, backend):
    given = operands(6)[:5]
    given[0][0, 2, 1] = float("nan")
    with omnimoe.backend(backend):
        y, _ = selective_scan(*given)
    assert y[0, 2:, 1].isnan().all()
    assert y.isnan().sum() == 4


def test_refused():
    *given, state = operands(3)
    with pytest.raises(ValueError, match=r"state must be \(2, 5, 3\) for x \(2, 3, 5\), got \(5, 3\)"):
        selective_scan(*given, state[0])


def test_the_library_is_used_where_it_can():
    with pytest.raises(BackendError, match="mamba_ssm"), omnimoe.backend("mamba_ssm"):
        selective_scan(*operands(3)[:5])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", [1, 40, 600])
def test_on_cuda(length):
    given = [part.cuda() for part in operands(length)]
    starts = torch.rand(2, length, device="cuda") < 0.05
    for found, wanted in zip(
        chunked.selective_scan(*given, starts), reference.selective_scan(*given, starts), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
