"""Models cut into stages: one after another they are the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnimoe.inputs import InputError
from omnimoe.layers import SpanTables
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.parallel import ParallelError
from omnimoe.routers import HashRouter
from omnimoe.stages import Stage, pipeline_stage
from tests.declarations import DECLARATIONS, DENSE, build, ids_like, routed

CUT = sorted(set(DECLARATIONS) - {"dense_tied", "transfusion"})

HASHED = DENSE.replace(experts=routed(4, HashRouter.Config(num_ids=DENSE.vocab_size)))


def stages(name: str, count: int) -> list[Stage]:
    return [pipeline_stage(build(DECLARATIONS[name]).train(), index, count) for index in range(count)]


def in_turn(cut: list[Stage], **inputs: Tensor) -> tuple[Tensor, ...]:
    given: tuple[Tensor, ...] = ()
    for stage in cut:
        given = stage(*given, **inputs)
    return given


@pytest.mark.parametrize("name", CUT)
def test_logits_loss_and_gradients_are_those_of_the_whole_model(name):
    config = DECLARATIONS[name]
    ids = ids_like(config)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole, cut = build(config).train(), stages(name, 2)
    wanted = whole(ids, attention_mask=mask, labels=ids)
    logits, loss = in_turn(cut, input_ids=ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(logits, wanted.logits)
    torch.testing.assert_close(loss, wanted.loss.view(1))
    wanted.loss.backward()
    loss.backward()
    held = [dict(stage.model.named_parameters()) for stage in cut]
    assert not held[0].keys() & held[1].keys()
    assert held[0].keys() | held[1].keys() == {key for key, _ in whole.named_parameters()}
    for key, parameter in whole.named_parameters():
        torch.testing.assert_close((held[0] | held[1])[key].grad, parameter.grad, atol=2e-6, rtol=1e-4, msg=key)


def test_what_stands_about_the_layers_lies_on_one_stage():
    """Rows of modalities are added once, norms of words and the layer before the head stand where these do."""
    config = DENSE.replace(modality_rows=True, layer_scale=0.5, embedding_norm_eps=1e-12, head_norm_eps=1e-12)
    ids, whole = ids_like(config), build(config)
    cut = [pipeline_stage(build(config), index, 2) for index in range(2)]
    logits, _ = in_turn(cut, input_ids=ids)
    torch.testing.assert_close(logits, whole(ids).logits)
    held = [set(stage.model.state_dict()) for stage in cut]
    assert not held[0] & held[1]
    assert held[0] | held[1] == set(whole.state_dict())
    biased = config.replace(
        attention=config.attention.replace(num_kv_heads=None),
        positions="spans",
        position_bias=SpanTables.Config(reaches=(99,) * len(config.modalities), sides=(0,) * len(config.modalities)),
    )
    with pytest.raises(ParallelError, match="has learned position biases"):
        pipeline_stage(build(biased), 0, 2)


def test_the_plan_of_the_config_says_what_lies_where():
    whole, plan = build(DECLARATIONS["mot_hybrid"]), DECLARATIONS["mot_hybrid"].base_model_pp_plan
    assert whole.supports_pp_plan
    assert list(plan) == ["embed_tokens", "backbone.layers", "norm"]
    cut = stages("mot_hybrid", 3)
    places = [{key.split(".")[1] for key, _ in stage.model.named_parameters()} for stage in cut]
    assert places == [{"embed_tokens", "backbone"}, {"backbone"}, {"backbone", "norm", "weight"}]
    for number, stage in enumerate(cut):
        assert list(dict(stage.model.model.backbone.layers.named_children())) == [str(number)]
    names = [key for stage in cut for key in stage.model.state_dict()]
    assert sorted(names) == sorted(whole.state_dict())


def test_what_a_layer_takes_and_gives_has_the_names_of_the_plan():
    import inspect

    from omnimoe.backbone import Block

    taken, given = DENSE.base_model_pp_plan["backbone.layers"]
    assert ["self", *taken] == list(inspect.signature(Block.forward).parameters)
    model, seen = build(DENSE), []
    model.model.backbone.layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    model(ids_like(DENSE))
    assert len(seen[0]) == len(given)


def test_spans_that_attend_both_ways_and_packed_documents_are_known_on_every_stage():
    config = DECLARATIONS["block_causal"]
    ids = ids_like(config)
    segments = torch.arange(ids.shape[1]).expand_as(ids) // 7
    wanted = build(config).train()(ids, segment_ids=segments, labels=ids)
    logits, loss = in_turn(stages("block_causal", 2), input_ids=ids, segment_ids=segments, labels=ids)
    torch.testing.assert_close(logits, wanted.logits)
    torch.testing.assert_close(loss, wanted.loss.view(1))


def test_without_labels_what_is_left_is_the_balance_loss():
    ids = ids_like(DENSE)
    for name in ("dense", "moe"):
        wanted = build(DECLARATIONS[name]).train()(ids)
        logits, balance = in_turn(stages(name, 2), input_ids=ids)
        torch.testing.assert_close(logits, wanted.logits)
        torch.testing.assert_close(balance, torch.zeros(1) if name == "dense" else wanted.aux_loss.view(1))


@pytest.mark.parametrize(
    ("config", "index", "count", "message"),
    [
        (DENSE, 0, 3, "stage 0 of 3 cannot be cut out of 2 layers; take 2 to 2 stages"),
        (DENSE, 2, 2, "stage 2 of 2 cannot"),
        (DENSE, 0, 1, "stage 0 of 1 cannot"),
        (DECLARATIONS["dense_tied"], 0, 2, "one table for the first stage and the last; set tie_word_embeddings=False"),
        (DECLARATIONS["transfusion"], 0, 2, "has latent, whose features all stages would have to read; take FSDP2"),
        (HASHED, 0, 2, "routers that look at token ids"),
    ],
    ids=["layers", "index", "one", "tied", "latents", "hash"],
)
def test_what_cannot_be_cut_is_refused_and_stays_whole(config, index, count, message):
    model = build(config)
    before = list(model.state_dict())
    with pytest.raises(ParallelError, match=message):
        pipeline_stage(model, index, count)
    assert list(model.state_dict()) == before


def test_a_later_stage_alone_says_what_it_lacks():
    with pytest.raises(InputError, match="stage 1 of 2 got no hidden states; pass what stage before it gave"):
        stages("dense", 2)[1](input_ids=ids_like(DENSE))


def test_a_size_of_transformers_own_pipeline_is_refused(monkeypatch):
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(pp_size=2)
    with pytest.raises(ParallelError, match="pp_size=2.*take omnimoe.stages.pipeline_stage"):
        OmniMoeForCausalLM.maybe_distribute_model(build(DENSE), config, object())
