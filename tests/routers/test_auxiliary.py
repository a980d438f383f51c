"""Auxiliary routers by themselves: what they take before and after they are trained, and what their loss moves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.routers import AuxiliaryRouter


def test_one_that_was_never_trained_takes_nothing_and_says_so():
    router, x = AuxiliaryRouter(8, 3), torch.randn(20, 8)
    assert not router.is_trained
    assert not router.takes(x).any()
    router.loss(x, torch.ones(20, 3)).backward()
    torch.optim.AdamW(router.parameters(), lr=0.1).step()
    assert router.is_trained
    assert router.takes(x).any()


def test_a_step_without_rows_does_not_count_as_training():
    router = AuxiliaryRouter(8, 3)
    router.loss(torch.randn(0, 8), torch.ones(0, 3)).backward()
    torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.5).step()
    assert all(parameter.grad is not None for parameter in router.parameters())
    assert not router.is_trained


@pytest.mark.parametrize("counted", [None, torch.arange(20) % 3 != 0])
def test_the_loss_is_the_mean_over_rows_that_count_and_stops_at_its_input(counted):
    router = AuxiliaryRouter(8, 3)
    torch.nn.init.normal_(router.outer.weight)
    x, chosen = torch.randn(20, 8, requires_grad=True), (torch.randn(20, 3) > 0).float()
    loss = router.loss(x, chosen, counted)
    kept = torch.ones(20, dtype=torch.bool) if counted is None else counted
    wanted = F.binary_cross_entropy(torch.sigmoid(router(x))[kept], chosen[kept])
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert x.grad is None
    assert all(parameter.grad.any() for parameter in router.parameters())


def test_it_is_two_matrices_a_silu_and_a_threshold_in_float32_and_counted_as_such():
    router, x = AuxiliaryRouter(8, 3).bfloat16(), torch.randn(5, 8).bfloat16()
    torch.nn.init.normal_(router.outer.weight)
    torch.nn.init.normal_(router.outer.bias)
    inner, outer, bias = (held.detach().float() for held in router.parameters())
    wanted = F.silu(x.float() @ inner.T) @ outer.T + bias
    torch.testing.assert_close(router(x), wanted)
    assert torch.equal(router.takes(x), torch.sigmoid(wanted) > 0.5)
    assert sum(held.numel() for held in router.parameters()) == AuxiliaryRouter.num_params(8, 3) == 4 * (8 + 3) + 3
