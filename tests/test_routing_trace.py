"""What a trace of routing says, against counts by hand; its pictures; what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch

import omnimoe
from omnimoe.layers import RowLayout
from omnimoe.routers import ExpertChoiceRouter, Routing, TopKRouter
from tests.declarations import DECLARATIONS, DENSE, build, ids_like, routed


def traced(config, seeds=(0, 1), **inputs):
    model = build(config)
    outs = []
    with omnimoe.record_routing(model) as trace, torch.no_grad():
        for seed in seeds:
            outs.append(model(ids_like(config, seed=seed), **inputs))
    return trace, outs


def entropy(shares: torch.Tensor) -> float:
    return float(-torch.xlogy(shares.double(), shares.double()).sum())


@pytest.mark.parametrize("name", ["moe", "moma_top_k", "expert_choice", "mot_hybrid"])
def test_each_number_is_what_the_routings_say(name):
    config = DECLARATIONS[name]
    trace, outs = traced(config)
    modalities = torch.cat([out.rows.modality_ids for out in outs])
    for layer in trace.layers():
        parts = [out.routings[layer.layer] for out in outs]
        ids = torch.cat([part.expert_ids for part in parts])
        width = len(layer.load)
        load = torch.bincount(ids, minlength=width).double() / len(ids)
        assert layer.load == pytest.approx(load.tolist())
        assert layer.balance == pytest.approx(entropy(load) / math.log(width))
        assert layer.busiest == pytest.approx(float(load.max() * width))
        assert layer.experts_per_token == pytest.approx(len(ids) / len(modalities))
        logits = torch.cat([part.router_logits for part in parts])
        finite = logits.isfinite().any(-1)
        certainty = torch.stack([torch.tensor(entropy(row.softmax(-1))) for row in logits[finite]]).mean()
        assert layer.router_entropy == pytest.approx(float(certainty), rel=1e-4)
        kinds = torch.cat([out.rows.modality_ids[part.token_index] for out, part in zip(outs, parts, strict=True)])
        joint = torch.zeros(3, width).index_put((kinds, ids), torch.ones(len(ids)), accumulate=True) / len(ids)
        known = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
        assert layer.mutual_information == pytest.approx(known, abs=1e-5)
        assert layer.dropped_share == layer.null_share == 0
    assert trace.mean("balance") == pytest.approx(sum(x.balance for x in trace.layers()) / len(trace.layers()))


def test_experts_of_modalities_tell_the_modality_whole():
    trace, outs = traced(DECLARATIONS["static"])
    counts = trace.tokens().double()
    assert torch.equal(counts.long(), torch.bincount(torch.cat([out.rows.modality_ids for out in outs]), minlength=3))
    for layer in trace.layers():
        assert layer.mutual_information == pytest.approx(entropy(counts / counts.sum()))
        assert layer.router_entropy is None


def test_dropped_and_null_choices_have_their_shares():
    router = TopKRouter.Config(top_k=2, capacity=3)
    config = DENSE.replace(experts=routed(4, router, num_zero_experts=2))
    trace, outs = traced(config, seeds=(0,))
    for layer in trace.layers():
        ids = outs[0].routings[layer.layer].expert_ids
        assert layer.dropped_share == pytest.approx(float((ids < 0).double().mean()))
        assert layer.null_share == pytest.approx(float((ids >= 4).double().mean()))
        touched = outs[0].routings[layer.layer].token_index[(ids >= 0) & (ids < 4)].unique()
        assert layer.untouched_share == pytest.approx(1 - len(touched) / 24)
        assert layer.dropped_share > 0
    assert "dropped" in str(trace)


def test_towers_show_in_the_load_but_route_nothing():
    trace, _ = traced(DECLARATIONS["mot"])
    assert torch.equal(trace.load(), torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert trace.layers() == []
    assert "towers alone" in str(trace)
    assert math.isnan(trace.mean("balance"))


def test_it_listens_inside_of_the_block_alone_and_through_generate():
    config = DECLARATIONS["moe"]
    model = build(config)
    ids = torch.full((1, 4), 9)
    with omnimoe.record_routing(model) as trace:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert trace.num_forwards == 3
    assert int(trace.tokens().sum()) == 4 + 2
    model(ids)
    assert trace.num_forwards == 3
    assert not model.model._forward_hooks
    with pytest.raises(RuntimeError), omnimoe.record_routing(model):
        raise RuntimeError
    assert not model.model._forward_hooks


def test_padding_is_not_counted():
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    trace, _ = traced(DECLARATIONS["moe"], seeds=(0,), attention_mask=mask)
    assert int(trace.tokens().sum()) == 19


def test_a_wrapper_is_looked_into_and_anything_else_is_refused():
    model = build(DECLARATIONS["moe"])
    with omnimoe.record_routing(torch.nn.Sequential(model)) as trace:
        model(torch.full((1, 4), 9))
    assert trace.num_forwards == 1
    with pytest.raises(TypeError, match="holds no omnimoe model"), omnimoe.record_routing(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("by", ["modality", "key", "layer"])
def test_a_heatmap_is_drawn(by, tmp_path):
    pytest.importorskip("matplotlib")
    trace, _ = traced(DENSE.replace(experts=routed(4, TopKRouter.Config(), num_zero_experts=1)))
    path = trace.heatmap(by=by, path=tmp_path / "new" / f"{by}.png", title="a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = trace.heatmap(by=by)
    image = figure.axes[0].images[0].get_array()
    assert image.shape == ((2, 5) if by == "layer" else (6, 5))
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["0", "1", "2", "3", "zero"]


def test_a_heatmap_says_what_is_missing():
    model = build(DECLARATIONS["moe"])
    with omnimoe.record_routing(model) as trace:
        pass
    with pytest.raises(ValueError, match="nothing was recorded"):
        trace.heatmap()
    with pytest.raises(ValueError, match="known: modality, key, layer"):
        trace.heatmap(by="colour")


def test_keys_that_are_not_modalities_have_rows_of_their_own():
    config = DENSE.replace(keys=("und", "gen"), experts=routed(4, ExpertChoiceRouter.Config()))
    keys = torch.zeros(2, 12, dtype=torch.int64)
    keys[:, 7:] = 1
    trace, _ = traced(config, seeds=(0,), key_ids=keys)
    assert trace.tokens("key").tolist() == [14, 10]
    assert trace.load("key").shape == (2, 2, 4)
    assert trace.load("modality").shape == (2, 3, 4)


def test_a_router_of_ones_own_is_recorded_without_logits():
    trace, _ = traced(DECLARATIONS["static"], seeds=(0,))
    rows = RowLayout.build(torch.zeros(1, 3, dtype=torch.int64), num_keys=3)
    before = trace.num_forwards
    trace.add([Routing(torch.arange(3), torch.tensor([0, -1, 2]), torch.ones(3))] * 2, rows)
    assert trace.num_forwards == before + 1
    assert trace.layers()[0].untouched_share == pytest.approx(1 / 27)
