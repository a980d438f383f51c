"""Every router inside a model: it trains, says truly whether it is causal, generates or says why not, is saved."""

from __future__ import annotations

import pytest
import torch

import omnimoe
from omnimoe.config import ConfigError
from omnimoe.experts import RoutedAttention
from omnimoe.inputs import InputError
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.routers import (
    ROUTERS,
    AttributeRouter,
    ByModalityRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    SoftRouter,
    SparseMixerRouter,
    StaticRouter,
    TopKRouter,
)
from tests.declarations import DENSE, build, ids_like, routed

V3 = {"score": "sigmoid", "num_groups": 2, "num_groups_kept": 1, "expert_bias": "shared", "routed_scaling_factor": 2.5}
FREE = {"num_zero_experts": 1, "num_identity_experts": 1, "num_constant_experts": 1}


def grouped(router, **changes):
    return routed(6, ByModalityRouter.Config(experts=(2, 3, 1), router=router), **changes)


EXPERTS = {
    "skills": routed(4, StaticRouter.Config(experts_of_keys=(0, (1, 2), (0, 3)))),
    "attributes": routed(4, AttributeRouter.Config(attributes_of_keys=((1, 0, 1), (0, 1, 1), (0, 0, 1)))),
    "hash": routed(4, HashRouter.Config(num_ids=DENSE.vocab_size, top_k=2)),
    "hash, plain": routed(4, HashRouter.Config(num_ids=DENSE.vocab_size, is_learned=False)),
    "deepseek": routed(4, TopKRouter.Config(**V3), num_shared_experts=1),
    "per-modality bias": routed(4, TopKRouter.Config(expert_bias="key")),
    "null experts": routed(
        4, TopKRouter.Config(top_k=5, top_p=0.7), num_shared_experts=2, shared_gate="softmax", num_zero_experts=1
    ),
    "sparse mixer": routed(4, SparseMixerRouter.Config(top_k=3)),
    "free experts": routed(4, TopKRouter.Config(top_k=3), **FREE),
    "input": routed(4, TopKRouter.Config(top_k=1, score="sigmoid"), weights_on="input"),
    "gated": routed(4, TopKRouter.Config(), num_shared_experts=1, shared_intermediate_size=8, shared_gate="sigmoid"),
    "capacity": routed(4, TopKRouter.Config(capacity_factor=0.6)),
    "capacity by sequence": routed(4, TopKRouter.Config(capacity_factor=0.6, capacity_pool="sequence")),
    "batch priority": routed(4, TopKRouter.Config(capacity_factor=0.6, capacity_priority="score")),
    "expert choice": routed(4, ExpertChoiceRouter.Config(score="softmax", capacity_factor=2.0)),
    "auxiliary": grouped(ExpertChoiceRouter.Config(causal_form="auxiliary")),
    "expert choice alone": routed(4, ExpertChoiceRouter.Config(causal_form="none")),
    "threshold": grouped(ExpertThresholdRouter.Config()),
    "by modality, deepseek": grouped(TopKRouter.Config(top_k=1, score="sqrt_softplus", expert_bias="shared")),
    "soft": routed(3, SoftRouter.Config(num_slots=2)),
    "soft, by modality": routed(3, SoftRouter.Config(experts=(1, 1, 1))),
}


def in_attention(experts, **changes) -> RoutedAttention.Config:
    """The same router over the projections of attention."""
    same = ("num_experts", "router", "num_shared_experts", "shared_gate", "num_zero_experts")
    return RoutedAttention.Config(
        num_heads=4, num_kv_heads=2, **{name: getattr(experts, name) for name in same}, **changes
    )


# each router also over the banks of attention; experts that give back what they get have no place there
OVER_FEED_FORWARD_ALONE = {"free experts", "input"}
ATTENTIONS = {
    f"attention, {name}": in_attention(experts)
    for name, experts in EXPERTS.items()
    if name not in OVER_FEED_FORWARD_ALONE
}
OWN_HEADS = {"own_heads": True, "qk_norm": "rms"}
ATTENTIONS |= {
    f"own heads, {name}": in_attention(EXPERTS[name], **OWN_HEADS)
    for name in ("skills", "deepseek", "null experts", "capacity", "expert choice", "auxiliary")
}
PARTS = EXPERTS | ATTENTIONS
CAUSAL = [name for name, part in PARTS.items() if part.is_causal]
GENERATES = [name for name, part in PARTS.items() if part.has_causal_form]
ACROSS = [name for name in PARTS if name not in CAUSAL]


def config_of(name: str) -> OmniMoeConfig:
    return DENSE.replace(**{"attention" if name in ATTENTIONS else "experts": PARTS[name]})


def later_tokens_changed(config: OmniMoeConfig, at: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches that agree up to a position."""
    one, other = ids_like(config, seed=1), ids_like(config, seed=2)
    other[:, :at] = one[:, :at]
    return one, other


def test_these_are_causal_and_those_are_not():
    across = {
        "capacity", "capacity by sequence", "batch priority", "expert choice", "auxiliary", "expert choice alone",
        "soft", "soft, by modality",
    }  # fmt: skip
    own_heads = {"own heads, capacity", "own heads, expert choice", "own heads, auxiliary"}
    assert set(ACROSS) == across | {f"attention, {name}" for name in across} | own_heads
    alone = {"expert choice alone", "soft", "soft, by modality"}
    assert {*PARTS} - {*GENERATES} == alone | {f"attention, {name}" for name in alone}


@pytest.mark.parametrize("name", PARTS)
def test_it_trains_and_every_weight_takes_part(name):
    config = config_of(name)
    model = build(config).train()
    ids = ids_like(config)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    model.update_routers(out.routings)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("name", PARTS)
def test_a_batch_of_one_modality_is_finite(name):
    config = config_of(name)
    model = build(config).train()
    ids = torch.full((1, 6), 9)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_and_low_precision_are_finite(name, dtype):
    config = config_of(name)
    model = build(config).to(dtype).train()
    for ids in (ids_like(config), torch.zeros(0, 5, dtype=torch.int64)):
        out = model(ids, labels=ids)
        out.loss.backward()
        model.update_routers(out.routings)
        assert out.loss.isfinite()
        assert out.logits.dtype == dtype
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_router_does_not_see_later_tokens(name):
    config = config_of(name)
    model = build(config)
    one, other = later_tokens_changed(config)
    torch.testing.assert_close(model(one).logits[:, :7], model(other).logits[:, :7], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ACROSS)
def test_the_others_do_see_them(name):
    config = config_of(name)
    model = build(config)
    one, other = later_tokens_changed(config)
    assert not torch.allclose(model(one).logits[:, :7], model(other).logits[:, :7], atol=1e-3)


@pytest.mark.parametrize("name", GENERATES)
def test_where_rows_are_routed_alone_none_does_and_steps_equal_the_whole(name):
    config = config_of(name)
    model = build(config)
    one, other = later_tokens_changed(config)
    whole = model(one, use_cache=True).logits
    torch.testing.assert_close(whole[:, :7], model(other, use_cache=True).logits[:, :7], atol=1e-5, rtol=1e-4)
    out = model(one[:, :7], use_cache=True)
    steps = [out.logits]
    for at in range(7, 12):
        out = model(one[:, at : at + 1], past_key_values=out.past_key_values)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", PARTS)
def test_it_generates_or_says_why_not(name):
    model = build(config_of(name))
    ids = torch.full((1, 4), 9)
    if name in GENERATES:
        assert model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 6)
        return
    for use_cache in (True, False):
        with pytest.raises(InputError, match=r"in layers 0, 1 routes a row by looking at others.*causal_form"):
            model.generate(ids, max_new_tokens=2, use_cache=use_cache)


def never_trained(router) -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    return OmniMoeForCausalLM(DENSE.replace(experts=routed(6, router))).eval()


@pytest.mark.parametrize("grown", [False, True], ids=["one pool", "groups"])
def test_cut_offs_that_never_moved_do_not_generate(grown):
    choice = ExpertChoiceRouter.Config()
    model = never_trained(ByModalityRouter.Config(experts=(2, 2, 2), router=choice) if grown else choice)
    ids = torch.full((1, 4), 9)
    with pytest.raises(InputError, match=r"in layers 0, 1 never moved.*model.update_routers.*--stage auxiliary"):
        model.generate(ids, max_new_tokens=2)
    model.update_routers(model(ids).routings)  # of one modality alone
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_of_those_of_a_modality_that_was_never_shown_and_of_thresholds_it_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(omnimoe.inputs.logger, "warning_once", told.append)
    ids, choice = torch.full((1, 4), 9), ExpertChoiceRouter.Config()
    model = never_trained(ByModalityRouter.Config(experts=(2, 2, 2), router=choice))
    model.update_routers(model(ids).routings)
    model.generate(ids, max_new_tokens=1)
    never_trained(ExpertThresholdRouter.Config()).generate(ids, max_new_tokens=1)
    assert [message.startswith("cut-offs of experts in layers 0, 1 never moved") for message in told] == [True] * 2
    model.update_routers(model(ids_like(DENSE)).routings)
    model.generate(ids, max_new_tokens=1)
    assert len(told) == 2


@pytest.mark.parametrize("name", PARTS)
def test_its_config_and_buffers_are_saved_and_loaded(name, tmp_path):
    config = config_of(name)
    again = OmniMoeConfig.from_dict(config.to_dict())
    assert (again.attention, again.experts) == (config.attention, config.experts)
    model = build(config).train()
    out = model(ids_like(config), labels=ids_like(config))
    for _ in range(3):
        model.update_routers(out.routings)
    model.eval().save_pretrained(tmp_path)
    again = OmniMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, buffer in model.named_buffers():
        found = dict(again.named_buffers())[key]
        assert found.dtype == buffer.dtype, key
        assert torch.equal(found, buffer), key


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek", "capacity", "capacity by sequence", "free experts", "null experts", "auxiliary", "threshold"),
        *("attention, deepseek", "attention, capacity", "attention, auxiliary", "own heads, capacity"),
    ],
)
def test_padding_changes_nothing(name):
    config = config_of(name)
    model = build(config).train()
    ids = ids_like(config)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    short = model(ids[:, 3:])
    found = model(ids, attention_mask=mask)
    torch.testing.assert_close(found.logits[:, 3:], short.logits, atol=1e-5, rtol=1e-4)


def test_a_hash_table_needs_ids_and_says_so():
    model = build(config_of("hash"))
    ids = ids_like(DENSE)
    embeds, kinds = model.get_input_embeddings()(ids), model.model.modality_ids_of(ids)
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=embeds, modality_ids=kinds)


def test_a_table_smaller_than_the_vocabulary_is_refused_before_it_is_read():
    small = routed(4, HashRouter.Config(num_ids=DENSE.vocab_size - 1))
    with pytest.raises(ConfigError, match=r"layer 1 has 39 ids for a vocabulary of 40; set num_ids=40"):
        DENSE.replace(layers=(omnimoe.LayerRange(start=1, experts=small),))


ROLES = ("und", "gen")


@pytest.mark.parametrize(
    "experts",
    [
        routed(4, StaticRouter.Config(experts_of_keys=(3, (0, 1)))),
        routed(4, TopKRouter.Config(expert_bias="key", load_balance_by_key=True)),
        routed(4, ByModalityRouter.Config(experts=(1, 3), router=TopKRouter.Config(top_k=1, expert_bias="shared"))),
        routed(4, AttributeRouter.Config()),
        routed(3, SoftRouter.Config(experts=(1, 2))),
    ],
    ids=["static", "top_k", "groups", "attributes", "soft"],
)
def test_the_key_may_be_a_role_instead_of_the_modality(experts):
    model = build(DENSE.replace(keys=ROLES, experts=experts)).train()
    ids = ids_like(DENSE)
    keys = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(0))
    with omnimoe.record_routing(model) as trace:
        out = model(ids, labels=ids, key_ids=keys)
    out.loss.backward()
    model.update_routers(out.routings)
    assert trace.tokens("key").tolist() == torch.bincount(keys.flatten()).tolist()
    load = trace.load("key")[0]
    if load.shape[1] == 4 and isinstance(getattr(experts, "router", None), ByModalityRouter.Config):
        assert load[0].tolist() == [1, 0, 0, 0]
        assert load[1, 0] == 0


def test_bands_of_layers_may_have_routers_of_their_own():
    """The first layer by a table, as DeepSeek-V4; the trace tells them apart."""
    config = DENSE.replace(experts=EXPERTS["deepseek"], layers=(omnimoe.LayerRange(stop=1, experts=EXPERTS["hash"]),))
    model = build(config)
    with omnimoe.record_routing(model) as trace:
        model(ids_like(config))
    names = [type(layer.mlp.router).__name__ for layer in model.model.backbone.layers]
    assert names == ["HashRouter", "TopKRouter"]
    assert [layer.layer for layer in trace.layers()] == [0, 1]


@pytest.mark.parametrize("name", ["capacity", "free experts", "null experts", "soft", "auxiliary", *ATTENTIONS])
def test_recomputed_activations_give_the_same_gradients(name):
    config = config_of(name)
    found = []
    for recompute in (False, True):
        model = build(config).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = ids_like(config)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, msg=key)


def test_every_registered_router_has_a_line_here():
    parts = [experts.router for experts in EXPERTS.values() if hasattr(experts, "router")]
    covered = {part.target for part in parts} | {part.router.target for part in parts if hasattr(part, "router")}
    own = {ROUTERS.get(name) for name in ROUTERS.names()}
    assert {router for router in own if router.__module__.startswith("omnimoe.")} <= covered
