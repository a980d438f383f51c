"""Routers that know the experts of a row beforehand: by key, by a set of skills, by attributes, by a table of ids."""

from __future__ import annotations

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers import AttributeRouter, HashRouter, StaticRouter

KEYS = torch.tensor([[2, 0, 1, 0]])


def rows_of(keys: torch.Tensor = KEYS, **fields) -> RowLayout:
    rows = RowLayout.build(keys, num_keys=3, sort=False)
    return RowLayout(**{**vars(rows), **fields})


def static(num_experts: int = 4, **fields) -> StaticRouter:
    return StaticRouter.Config(**fields).build(hidden_size=5, num_experts=num_experts, num_modalities=3)


def test_the_expert_of_a_row_is_the_expert_of_its_key():
    rows, x = rows_of(), torch.randn(4, 5)
    for chosen, wanted in (((), [2, 0, 1, 0]), ((3, 1, 3), [3, 3, 1, 3])):
        routing = static(experts_of_keys=chosen)(x, rows)
        assert routing.expert_ids.tolist() == wanted
        assert routing.token_index.tolist() == [0, 1, 2, 3]
        assert torch.equal(routing.expert_weights, torch.ones(4))
        assert routing.router_logits is None


@pytest.mark.parametrize(("combine", "weights"), [("mean", (1, 0.5, 1 / 3)), ("sum", (1, 1, 1))])
def test_a_key_may_need_a_set_of_skills(combine, weights):
    router = static(experts_of_keys=(3, (0, 2), (0, 1, 3)), combine=combine)
    routing = router(torch.randn(4, 5), rows_of())
    found = {}
    for row, expert, weight in zip(
        routing.token_index.tolist(), routing.expert_ids.tolist(), routing.expert_weights.tolist(), strict=True
    ):
        if expert >= 0:
            found.setdefault(row, {})[expert] = weight
    sets = ({3}, {0, 2}, {0, 1, 3})
    for row, key in enumerate(KEYS[0].tolist()):
        assert set(found[row]) == sets[key]
        assert list(found[row].values()) == pytest.approx([weights[key]] * len(sets[key]))
    config = StaticRouter.Config(experts_of_keys=(3, (0, 2), (0, 1, 3)))
    assert [config.experts_per_token(4, key) for key in range(3)] == [1, 2, 3]
    assert StaticRouter.Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("chosen", [(0, 1), (0, 1, 4), (0, 1, (2, 2)), (0, 1, ())])
def test_sets_that_do_not_fit_are_refused(chosen):
    with pytest.raises(ConfigError, match="experts_of_keys"):
        static(experts_of_keys=chosen)


def attributes(**fields) -> AttributeRouter:
    config = AttributeRouter.Config(**{"top_k": 2, **fields})
    router = config.build(hidden_size=5, num_experts=8, num_modalities=3)
    for parameter in router.parameters():
        parameter.data.normal_()
    return router


def test_attributes_send_all_rows_of_a_code_the_same_way():
    codes = ((1, 0, 0, 1), (0, 1, 0, 1), (1, 0, 0, 1))
    router = attributes(attributes_of_keys=codes)
    routing = router(torch.randn(4, 5), rows_of())
    ids, weights = routing.expert_ids.view(4, 2), routing.expert_weights.view(4, 2)
    for row in (1, 3):  # key 0, whose code is that of key 2
        assert torch.equal(ids[0], ids[row])
        assert torch.equal(weights[0], weights[row])
    assert not torch.equal(weights[0], weights[2])
    weights[:, 0].sum().backward()
    assert router.embed.weight.grad.any()
    assert router.config.is_causal
    assert router.config.router_params(5, 8, 0) == 0


def test_a_key_without_a_code_has_a_bit_of_its_own():
    assert attributes().attributes == ((1, 0, 0), (0, 1, 0), (0, 0, 1))


@pytest.mark.parametrize("codes", [((1, 0), (0, 1)), ((1,), (0, 1), (1, 1)), ((2,), (0,), (1,))])
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(ConfigError, match="attributes_of_keys"):
        attributes(attributes_of_keys=codes)


def hashed(**fields) -> HashRouter:
    config = HashRouter.Config(**{"num_ids": 24, **fields})
    return config.build(hidden_size=5, num_experts=4, num_modalities=3)


@pytest.mark.parametrize("table", ["balanced", "random"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_table_gives_each_id_different_experts(table, top_k):
    router = hashed(table=table, top_k=top_k, is_learned=False)
    assert router.table.shape == (24, top_k)
    assert all(len(set(row)) == top_k for row in router.table.tolist())
    if table == "balanced":
        assert torch.bincount(router.table.flatten(), minlength=4).tolist() == [6 * top_k] * 4
    assert torch.equal(hashed(table=table, top_k=top_k).table, router.table)
    assert not torch.equal(hashed(table=table, top_k=top_k, seed=1).table, router.table)
    ids = torch.tensor([5, 23, 5, 0])
    routing = router(torch.randn(4, 5), rows_of(token_ids=ids))
    assert torch.equal(routing.expert_ids.view(4, top_k), router.table[ids])
    assert torch.equal(routing.expert_weights, torch.full((4 * top_k,), 1 / top_k))
    assert not list(router.parameters())


def test_learned_weights_follow_the_row_and_the_choice_does_not():
    router, ids = hashed(top_k=2), torch.tensor([5, 5, 1, 0])
    router.scorer.weight.data.normal_()
    routing = router(torch.randn(4, 5), rows_of(token_ids=ids))
    chosen, weights = routing.expert_ids.view(4, 2), routing.expert_weights.view(4, 2)
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))


def test_a_table_needs_token_ids():
    assert hashed().config.num_token_ids == 24
    with pytest.raises(ValueError, match="pass input_ids"):
        hashed()(torch.randn(4, 5), rows_of())
    with pytest.raises(ConfigError, match="size of the vocabulary"):
        hashed(num_ids=0)
