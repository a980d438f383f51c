"""Balance losses at balance, at collapse, and in between."""

from __future__ import annotations

import pytest
import torch

from omnimoe.routers import load_balance_loss, router_z_loss


@pytest.mark.parametrize("num_experts", [1, 4, 7])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_is_one_at_uniform_routing_for_any_top_k(num_experts, top_k):
    count = 2 * num_experts
    probs = torch.full((count, num_experts), 1 / num_experts)
    chosen = (torch.arange(count * top_k)) % num_experts
    torch.testing.assert_close(load_balance_loss(probs, chosen, top_k), torch.ones(()))


def test_the_balance_loss_is_the_number_of_experts_at_collapse():
    probs = torch.zeros(6, 4)
    probs[:, 2] = 1
    torch.testing.assert_close(load_balance_loss(probs, torch.full((6,), 2)), torch.tensor(4.0))


def test_the_balance_loss_is_the_product_of_shares_and_means():
    probs = torch.randn(9, 4).softmax(-1)
    chosen = probs.topk(2).indices.flatten()
    share = torch.bincount(chosen, minlength=4) / 18
    torch.testing.assert_close(load_balance_loss(probs, chosen, 2), 4 * (share * probs.mean(0)).sum())


def test_choices_a_token_are_counted_where_tokens_make_fewer_than_top_k():
    probs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    ids = probs.topk(2).indices
    ids[::2, 1] = -1
    counted, groups = torch.arange(50) % 5 > 0, torch.arange(50) % 2
    wanted = 0.0
    for group in (0, 1):
        rows = [row for row in range(50) if counted[row] and groups[row] == group]
        load = torch.stack([(ids[rows] == expert).sum() / len(rows) for expert in range(6)])
        wanted += 6 * (load * probs[rows].mean(0)).sum() * len(rows) / 40
    found = load_balance_loss(
        probs, ids.flatten(), 2, form="choices_per_token", groups=groups, num_groups=2, counted=counted
    )
    torch.testing.assert_close(found, wanted)


def test_its_gradient_pushes_down_what_is_chosen_too_often():
    logits = torch.zeros(8, 3, requires_grad=True)
    load_balance_loss(logits.softmax(-1), torch.zeros(8, dtype=torch.int64)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_the_z_loss_is_the_mean_squared_log_sum_exp():
    logits = torch.randn(5, 3)
    torch.testing.assert_close(router_z_loss(logits), logits.exp().sum(-1).log().square().mean())
    torch.testing.assert_close(
        router_z_loss(torch.zeros(5, 3) - torch.tensor(3.0).log()), torch.zeros(()), atol=1e-6, rtol=0
    )


def test_without_rows_both_are_zero_with_a_graph():
    logits = torch.zeros(0, 3, requires_grad=True)
    total = load_balance_loss(logits.softmax(-1), torch.zeros(0, dtype=torch.int64)) + router_z_loss(logits)
    assert total == 0
    total.backward()
