"""Mixture of depths: what is kept, that a layer works on it as on sequences of its own, what that saves, and how it
generates by auxiliary routers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import omnimoe
from omnimoe import NoExperts, StateSpace
from omnimoe.backbone import LayerRange
from omnimoe.config import ConfigError
from omnimoe.flops import flops, formulas
from omnimoe.inputs import InputError
from omnimoe.layers import RowLayout
from omnimoe.routers import DEPTH_ROUTERS, DepthRouter, TopKRouter, register_depth_router
from tests.declarations import DECLARATIONS, DENSE, build, ids_like, routed

KINDS = {
    "dense": DENSE,
    "mot": DECLARATIONS["mot"],
    "moma": DECLARATIONS["moma"],
    "moe": DENSE.replace(experts=routed(4, TopKRouter.Config(expert_bias="key"), num_shared_experts=1)),
    "block_causal": DECLARATIONS["block_causal"],
}


@pytest.fixture
def by_key():
    """A depth router of one's own: a layer works on the rows of some keys, whatever they hold."""

    @register_depth_router("by_key")
    class ByKey(DepthRouter):
        @dataclass(frozen=True, kw_only=True)
        class Config(DepthRouter.Config):
            kept: tuple[int, ...] = (0,)

            is_causal = has_causal_form = True

        def forward(self, x, rows):
            taken = torch.isin(rows.key_ids, torch.tensor(self.config.kept))
            return self._kept(taken, self.scorer(x).squeeze(1), x.dtype)

        alone = forward

    yield ByKey
    DEPTH_ROUTERS.remove("by_key")


def test_one_of_ones_own_is_saved_counted_and_generates(by_key, tmp_path):
    config = DENSE.replace(layers=(LayerRange(start=1, depth=by_key.Config(kept=(0, 2), capacity=0.6)),))
    assert config.is_causal
    model, ids = build(config), ids_like(config)
    out = model(ids)
    taken = out.routings[1].token_index
    assert torch.equal(taken, torch.isin(out.rows.key_ids, torch.tensor([0, 2])).nonzero().squeeze(1))
    assert flops(config).total == flops(DENSE.replace(layers=(LayerRange(start=1, depth=DEPTH_60),))).total
    torch.testing.assert_close(model(ids, use_cache=True).logits, out.logits, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = omnimoe.from_pretrained(tmp_path)
    assert again.config.blocks[1].depth == config.blocks[1].depth
    step = again(ids[:, :6], use_cache=True)
    for at in range(6, 12):
        step = again(ids[:, at : at + 1], past_key_values=step.past_key_values)
        torch.testing.assert_close(step.logits[:, 0], out.logits[:, at], atol=1e-5, rtol=1e-4)
    assert again.generate(ids[:, :6], max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (2, 8)
    with pytest.raises(ConfigError, match="needs no auxiliary ones"):
        omnimoe.add_auxiliary_routers(again)


DEPTH_60 = DepthRouter.Config(capacity=0.6)


def with_depth(name: str, **fields):
    depth = DepthRouter.Config(**{"capacity": 0.5, **fields})
    return KINDS[name].replace(layers=(LayerRange(step=2, depth=depth),))


def router_of(**fields) -> DepthRouter:
    router = DepthRouter.Config(**fields).build(hidden_size=4)
    router.scorer.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return router


@pytest.mark.parametrize("gate", ["sigmoid", "linear"])
@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("sort", [True, False])
def test_the_best_rows_of_the_pool_are_kept_with_their_gate(pool, gate, sort):
    keys = torch.randint(0, 2, (3, 7), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 4:] = False
    rows, router = RowLayout.build(keys, num_keys=2, valid=valid, sort=sort), router_of(pool=pool, gate=gate)
    x = torch.randn(len(rows), 4)
    index, weights = router(x, rows)
    score = (x @ router.scorer.weight.T).squeeze(1)
    torch.testing.assert_close(weights, score[index].sigmoid() if gate == "sigmoid" else score[index])
    assert index.tolist() == sorted(index.tolist())
    pools = rows.sequence_ids().tolist() if pool == "sequence" else [0] * len(rows)
    wanted = []
    for held in set(pools):
        own = [row for row in range(len(rows)) if pools[row] == held]
        wanted += sorted(own, key=lambda row: -score[row].item())[: math.ceil(0.25 * len(own))]
    assert sorted(wanted) == index.tolist()


@pytest.mark.parametrize(("capacity", "count", "kept"), [(0.07, 100, 7), (0.55, 100, 55), (0.28, 25, 7), (0.3, 7, 3)])
@pytest.mark.parametrize("pool", ["batch", "sequence", "ranks"])
def test_a_share_is_taken_exactly(pool, capacity, count, kept):
    """As floats, 0.07 of 100 is more than 7, and would be rounded up to 8."""
    rows = RowLayout.build(torch.zeros(1, count, dtype=torch.int64), num_keys=1)
    assert len(router_of(pool=pool, capacity=capacity)(torch.randn(count, 4), rows)[0]) == kept


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_layer_works_on_what_is_kept_as_on_sequences_of_its_own(name, pool, padded):
    """Sequence by sequence, the kept tokens alone in the batch, at the positions they had."""
    config = with_depth(name, pool=pool)
    model = build(config)
    layer, seen = model.model.backbone.layers[0], {}
    layer.register_forward_pre_hook(lambda module, given: seen.update(x=given[0], rows=given[1], mask=given[2]))
    layer.register_forward_hook(lambda module, given, out: seen.update(out=out))
    ids = ids_like(config)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    model(ids, attention_mask=mask if padded else None)
    x, rows = seen["x"], seen["rows"]
    index, weights = layer.depth(x, rows)
    y = seen["out"][0]
    rest = sorted(set(range(len(x))) - set(index.tolist()))
    assert torch.equal(y[rest], x[rest])
    kept = torch.zeros(24, dtype=torch.bool)
    place = index if rows.time_index is None else rows.time_index[index]
    kept[place] = True
    # everything that is not kept as padding, in sequences of the old length: the same attention, less shortly
    plain = build(KINDS[name])
    plain_layer = plain.model.backbone.layers[0]
    plain_layer.load_state_dict({key: value for key, value in layer.state_dict().items() if "depth" not in key})
    layout = RowLayout.build(model.model.modality_ids_of(ids), num_keys=3, valid=kept.view(2, 12), sort=rows.is_sorted)
    layout = layout.with_rotary(rows.cos[index], rows.sin[index])
    hidden = replace(seen["mask"], valid=kept.view(2, 12), _cached={})
    worked = plain_layer(x[index], layout, hidden)[0]
    wanted = x[index] + weights.unsqueeze(1) * (worked - x[index])
    torch.testing.assert_close(y[index], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_it_trains_is_recorded_and_stored(name, pool, tmp_path):
    config = with_depth(name, pool=pool)
    assert type(config).from_dict(config.to_dict()).layers == config.layers
    model = build(config).train()
    ids = ids_like(config)
    with omnimoe.record_routing(model) as trace:
        out = model(ids, labels=ids)
    out.loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert model.model.backbone.layers[0].depth.scorer.weight.grad.any()
    assert trace.layers()[0].untouched_share >= 0.5
    before = {key: value.clone() for key, value in model.named_buffers()}
    model.update_routers(out.routings)
    if name == "moe":
        assert any(not torch.equal(before[key], value) for key, value in model.named_buffers())


def test_all_rows_at_weight_one_are_the_plain_layer():
    config = with_depth("mot", capacity=1.0, gate="linear")
    model, plain = build(config), build(KINDS["mot"])
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    for layer in model.model.backbone.layers[::2]:
        layer.depth.forward = lambda x, rows: (torch.arange(len(x)), x.new_ones(len(x)))
    ids = ids_like(config)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_later_token_changes_an_earlier_one_so_it_does_not_generate():
    config = with_depth("dense")
    assert not config.is_causal
    for form in ("none", "auxiliary"):
        depth = DepthRouter.Config(causal_form=form)
        assert (depth.is_causal, depth.has_causal_form) == (False, form == "auxiliary")
    model = build(config)
    one, moved = ids_like(config, seed=1), []
    for seed in range(2, 8):
        other = torch.cat((one[:, :7], ids_like(config, seed=seed)[:, 7:]), 1)
        moved.append(not torch.allclose(model(one).logits[:, :7], model(other).logits[:, :7], atol=1e-3))
    assert any(moved)
    with pytest.raises(InputError, match="DepthRouter in layers 0 routes a row by looking at others"):
        model.generate(one, max_new_tokens=1)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(one, use_cache=True)


def test_a_state_space_under_depth_is_named_and_not_the_router():
    depth = DepthRouter.Config(causal_form="auxiliary")
    parts = {"attention": StateSpace.Config(), "experts": NoExperts.Config()}
    model = build(KINDS["dense"].replace(layers=(LayerRange(step=2, depth=depth, **parts),)))
    with pytest.raises(InputError, match=r"StateSpace in layers 0 stands in a mixture of depths"):
        model.generate(ids_like(model.config), max_new_tokens=1)


def causal(name: str, **fields):
    """Every second layer of three chosen by depth, with auxiliary routers there and, for MoMa, at its experts."""
    config = with_depth(name, **{"capacity": 0.5, "causal_form": "auxiliary", **fields}).replace(num_layers=3)
    if name != "moma":
        return config
    router = config.experts.router
    inside = router.replace(router=router.router.replace(causal_form="auxiliary"))
    return config.replace(experts=config.experts.replace(router=inside))


CAUSAL_KINDS = ["dense", "mot", "moma", "moe"]


@pytest.mark.parametrize("name", CAUSAL_KINDS)
@pytest.mark.parametrize("pool", ["batch", "sequence", "ranks"])
def test_with_auxiliary_routers_no_token_depends_on_later_ones_and_steps_are_the_whole(name, pool):
    """In full and in cached form; by the choice of the batch earlier ones do change."""
    config = causal(name, pool=pool)
    assert all(block.has_causal_form for block in config.blocks)
    assert not config.is_causal
    model, one, changes = build(config), ids_like(config, seed=1), []
    whole = model(one, use_cache=True)
    choices = [
        torch.zeros(24, dtype=torch.bool).index_fill(0, routing.token_index, True) for routing in whole.routings[::2]
    ]
    assert any(0 < int(taken.sum()) < 24 for taken in choices), "some go round"
    for seed in range(2, 6):
        other = torch.cat((one[:, :7], ids_like(config, seed=seed)[:, 7:]), 1)
        found = model(other, use_cache=True).logits
        torch.testing.assert_close(found[:, :7], whole.logits[:, :7], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found[:, 7:], whole.logits[:, 7:], atol=1e-3)
        changes.append((model(one).logits - model(other).logits)[:, :7].abs().max())
    assert max(changes) > 1e-3, "the choice of the batch looks ahead"
    for chunks in ((1,) * 12, (5, 1, 6)):
        cache, start, parts = None, 0, []
        for size in chunks:
            out = model(one[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole.logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["mot", "moma"])
def test_the_causal_form_is_the_layer_on_what_the_auxiliary_router_takes(name):
    """The same choice made by hand, on sequences of the taken rows alone."""
    config = causal(name)
    model = build(config)
    ids = ids_like(config)
    wanted = model(ids, use_cache=True).logits
    for layer in model.model.backbone.layers[::2]:
        depth = layer.depth
        depth.forward = depth.alone
        depth.losses = lambda x, index: {}
    for layer in model.model.backbone.layers:
        for router in filter(None, getattr(getattr(layer.mlp, "router", None), "routers", ())):
            router.forward = _alone(router)
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", ["sigmoid", "linear"])
def test_the_auxiliary_router_says_which_rows_and_the_main_one_what_they_weigh(gate):
    router, x = (
        router_of(gate=gate, causal_form="auxiliary"),
        torch.randn(40, 4, generator=torch.Generator().manual_seed(1)),
    )
    auxiliary = router.auxiliary
    with torch.no_grad():
        for weight in auxiliary.parameters():
            weight.normal_(std=2.0, generator=torch.Generator().manual_seed(3))
        auxiliary.outer.bias.fill_(0.1)
        hidden = x @ auxiliary.inner.weight.T
        foretold = (hidden * hidden.sigmoid() @ auxiliary.outer.weight.T + auxiliary.outer.bias).squeeze(1)
        score = (x @ router.scorer.weight.T).squeeze(1)
        index, weights = router.alone(x, None)
    assert index.tolist() == (foretold > 0).nonzero().squeeze(1).tolist()
    assert 5 < len(index) < 35
    torch.testing.assert_close(weights, score[index].sigmoid() if gate == "sigmoid" else score[index])


def _alone(router):
    whole = router.forward
    return lambda x, rows: whole(x, replace(rows, routes_causally=True))


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_it_generates_what_the_whole_gives(how):
    config = causal("moma")
    model, ids = build(config), ids_like(config)[:, :6]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "free": True}
    made = model.generate(ids, attention_mask=mask, **asked, **how)
    mask = torch.nn.functional.pad(mask, (0, 5), value=1)
    scored = model(made, attention_mask=mask, use_cache=True).logits[:, 5:-1]
    if not how.get("num_beams"):
        assert torch.equal(made[:, 6:], scored.argmax(-1))
        return
    greedy = model.generate(ids, attention_mask=mask[:, :6], **asked)
    of_greedy = model(greedy, attention_mask=mask, use_cache=True).logits[:, 5:-1]
    score = [
        logits.log_softmax(-1).gather(2, ids[:, 6:, None]).sum((1, 2))
        for logits, ids in ((scored, made), (of_greedy, greedy))
    ]
    assert (score[0] >= score[1] - 1e-4).all()


def test_a_quantized_cache_would_lose_its_marks_and_is_refused():
    model = build(causal("dense"))
    with pytest.raises(InputError, match="drop cache_implementation='quantized'"):
        model.generate(ids_like(DENSE), max_new_tokens=1, cache_implementation="quantized")


def test_its_auxiliary_router_learns_the_choice_and_moves_nothing_else():
    config = causal("moma")
    model, ids = build(config).train(), ids_like(config)
    losses = [loss for routing in model(ids).routings for name, loss in routing.losses.items() if "depth" in name]
    assert len(losses) == 2
    sum(losses).backward()
    moved = [name for name, held in model.named_parameters() if held.grad is not None and held.grad.any()]
    assert moved
    assert all(".depth.auxiliary." in name for name in moved)


@pytest.mark.parametrize("form", ["none", "auxiliary"])
@pytest.mark.parametrize("name", ["dense", "mot"])
def test_its_cost_is_that_of_the_kept_rows(name, form):
    config = with_depth(name, causal_form=form)
    model, ids = build(config), ids_like(config)
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        model(ids)
    counted = flops(config, ids)
    assert counted.total == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert counted.total < flops(KINDS[name], ids).total


def test_what_does_not_fit_is_refused():
    for fields, told in (
        ({"capacity": 0.0}, "above 0"),
        ({"pool": "image"}, "known: batch"),
        ({"gate": "tanh"}, "known: sig"),
        ({"causal_form": "cutoff"}, "known: auxiliary"),
    ):
        with pytest.raises(ConfigError, match=told):
            DepthRouter.Config(**fields)
