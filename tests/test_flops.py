"""The closed form against PyTorch's counter on real forwards and backwards, for every kind of model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omnimoe import (
    Attention,
    BaseAttention,
    Experts,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    RoutedExperts,
    Tokens,
    active_params,
    flops,
    load,
    register_attention,
    register_experts,
    shrink,
)
from omnimoe.experts import RoutedAttention, RoutedStateSpace
from omnimoe.experts.base import EXPERTS
from omnimoe.flops import KINDS, formulas, total_params
from omnimoe.layers.attention import ATTENTIONS
from omnimoe.model import MODELS
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, TopKRouter


def small(name: str) -> OmniMoeConfig:
    return shrink(MODELS.get(name)())


def routed(router, num_experts: int, **more) -> OmniMoeConfig:
    experts = RoutedExperts.Config(num_experts=num_experts, intermediate_size=48, router=router, **more)
    return small("dense_nano").replace(experts=experts)


def ids_of(config: OmniMoeConfig, batch_size: int = 2, spans: int = 8) -> torch.Tensor:
    """``(B, T)``: as many rows of every discrete modality, a multiple of 8, mixed up."""
    ranges = list(config.token_ranges.values())
    parts = [torch.randint(max(8, held.start), held.stop, (batch_size, spans)) for held in ranges]
    ids = torch.cat(parts, dim=1)
    return ids[:, torch.randperm(ids.shape[1])]


def counted(model: OmniMoeForCausalLM, *, backward: bool, **batch) -> int:
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        out = model(**batch)
        if backward:
            out.loss.backward()
    return counter.get_total_flops()


CONFIGS = {
    "dense": lambda: small("dense_nano"),
    "grouped queries, wide heads, biases": lambda: small("dense_nano").replace(
        attention=Attention.Config(
            num_heads=8, num_kv_heads=2, head_dim=24, bias=True, output_bias=True, qk_norm="layer"
        )
    ),
    "mot": lambda: small("mot_nano"),
    "mot, merged towers": lambda: small("dense_nano").replace(
        attention=Attention.Config(num_heads=4, towers=(0, 1, 1)),
        experts=small("dense_nano").experts.replace(towers=(0, 1, 0)),
    ),
    "moma, token choice": lambda: small("moma_nano"),
    "moma, expert choice": lambda: routed(ByModalityRouter.Config(experts=(4, 2, 1)), 7),
    "moma of two modalities": lambda: small("moma_90m_4t4i"),
    "moe, token choice": lambda: small("moe_nano"),
    "moe, top 3 and shared experts": lambda: routed(TopKRouter.Config(top_k=3), 5, num_shared_experts=2),
    "pools of unequal width": lambda: routed(
        ByModalityRouter.Config(experts=(4, 2, 2), router=TopKRouter.Config(top_k=2)),
        8,
        pools=((4, 48), (2, 16), (2, 32)),
        num_shared_experts=1,
    ),
    "moe, expert choice": lambda: small("moe4x_37m"),
    "moe, expert choice of two": lambda: routed(ExpertChoiceRouter.Config(capacity_factor=2.0), 8),
    "experts in attention": lambda: small("dense_nano").replace(
        attention=RoutedAttention.Config(
            num_heads=4, num_kv_heads=2, bias=True, num_experts=6, router=TopKRouter.Config(top_k=3)
        )
    ),
    "experts in values and out": lambda: small("dense_nano").replace(
        attention=RoutedAttention.Config(
            num_heads=4,
            num_experts=7,
            router=ByModalityRouter.Config(experts=(4, 2, 1)),
            routed_sites=("v_proj", "o_proj"),
            site_towers={"q_proj": "modality"},
        )
    ),
    "experts with heads of their own": lambda: small("dense_nano").replace(
        attention=RoutedAttention.Config(
            num_heads=2, num_kv_heads=1, head_dim=24, num_experts=6, own_heads=True, num_shared_experts=1
        )
    ),
    "experts in a state space": lambda: small("dense_nano").replace(
        attention=RoutedStateSpace.Config(num_experts=4, router=TopKRouter.Config(top_k=2), num_shared_experts=1)
    ),
    "two matrices": lambda: small("dense_nano").replace(experts=small("dense_nano").experts.replace(gated=False)),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_closed_form_is_what_is_computed(config, backward, attention):
    config = config()
    config._attn_implementation = attention
    model, ids = OmniMoeForCausalLM(config), ids_of(config)
    found = flops(model, ids, backward=backward)
    assert found.total == counted(model, backward=backward, input_ids=ids, labels=ids)
    assert found.backward is backward
    assert found.tokens == ids.numel()


@pytest.mark.parametrize("backward", [False, True])
def test_continuous_rows(backward):
    config = small("mot_transfusion_163m")
    model, ids = OmniMoeForCausalLM(config), torch.randint(8, 60, (2, 20))
    ids[:, 4:8] = 0
    rows = torch.randn(8, 32, requires_grad=True)
    batch = {"input_ids": ids, "features": {"image": rows}, "targets": {"image": torch.zeros(8, 32)}, "labels": ids}
    found = flops(model, batch, backward=backward)
    assert found.total == counted(model, backward=backward, **batch)
    assert found.by_kind["adapters"] == (3 if backward else 1) * 2 * 8 * 2 * 32 * 64
    assert found.by_modality["image"] > found.by_kind["adapters"]


def test_padding_costs_scores_and_head_alone():
    config = small("mot_nano")
    model, ids = OmniMoeForCausalLM(config), ids_of(config)
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    found = flops(model, {"input_ids": ids, "attention_mask": mask})
    assert found.total == counted(model, backward=False, input_ids=ids, attention_mask=mask)
    assert found.tokens == int(mask.sum())
    assert found.by_modality["padding"] == 8 * (2 * 64 * config.vocab_size + 2 * 4 * 24 * 64)
    assert "padding" not in flops(model, ids).by_modality


def test_padding_may_be_told_by_mask_and_by_segments_at_once():
    config = small("mot_nano")
    ids = ids_of(config)
    segments = torch.zeros_like(ids)
    segments[1, 16:] = -1
    by_segments = flops(config, {"input_ids": ids, "segment_ids": segments})
    both = flops(config, {"input_ids": ids, "segment_ids": segments, "attention_mask": torch.ones_like(ids)})
    assert both.tokens == by_segments.tokens == int((segments >= 0).sum())


def test_the_split_adds_up():
    config = small("moma_nano")
    found = flops(config, ids_of(config))
    assert tuple(found.by_kind) == KINDS
    assert tuple(found.by_modality) == config.modality_names
    assert sum(found.by_kind.values()) == sum(found.by_modality.values()) == found.total
    assert found.per_token == found.total / found.tokens
    assert min(found.by_kind[kind] for kind in KINDS if kind != "adapters") > 0


def test_by_hand():
    config = OmniMoeConfig(
        hidden_size=8,
        num_layers=1,
        attention=Attention.Config(num_heads=2),
        modalities=(Tokens.Config(name="text", vocab_size=10),),
    )
    config = config.replace(experts=config.experts.replace(intermediate_size=12))
    found = flops(config, sequence_length=6)
    assert found.by_kind == {
        "attention_projections": 6 * 2 * 4 * 64,
        "attention_scores": 6 * 4 * 6 * 8,
        "experts": 6 * 2 * 3 * 8 * 12,
        "router": 0,
        "head": 6 * 2 * 8 * 10,
        "adapters": 0,
    }
    assert active_params(config) == total_params(config) == 2 * 10 * 8 + 8 + 4 * 64 + 3 * 8 * 12 + 2 * 8


def test_modalities_may_be_read_from_ids_or_given():
    config = small("mot_nano")
    ids = ids_of(config)
    given = {"input_ids": ids, "modality_ids": torch.ones_like(ids)}
    assert [name for name, count in flops(config, given).by_modality.items() if count] == ["image"]
    assert flops(config, given).total == flops(config, ids).total


@pytest.mark.parametrize("name", ["mot_37m", "mot_37m_speech", "mot_1_5b"])
def test_a_tower_costs_what_the_dense_twin_costs(name):
    dense = name.replace("mot", "chameleon")
    assert flops(MODELS.get(name)()).total == flops(MODELS.get(dense)()).total


def test_the_formula_of_the_papers():
    """MoMa: L (24 d^2 + 4 S d) + 2 V d, with a feed-forward network of 8 d / 3."""
    config = MODELS.get("chameleon_1_4b")()
    formula = 24 * (24 * 2048**2 + 4 * 4096 * 2048) + 2 * 65_536 * 2048
    assert flops(config, sequence_length=4096).per_token == pytest.approx(formula, rel=1e-4)


@pytest.mark.parametrize("name", ["chameleon_37m", "dense_nano", "transfusion_163m"])
def test_active_is_total_in_a_dense_model(name):
    config = MODELS.get(name)()
    adapters = sum(modality.active_params(config.hidden_size) for modality in config.modalities)
    assert active_params(config, "text") == total_params(config) - adapters


def test_biases_and_norms_are_weights_too():
    config = CONFIGS["grouped queries, wide heads, biases"]()
    assert active_params(config) == total_params(config)


def test_active_by_modality_and_mean():
    config = MODELS.get("moma_90m_7t1i")()
    text, image = active_params(config, "text"), active_params(config, "image")
    assert text - image == 8 * 512 * 7, "the only expert of a group has no router"
    assert active_params(config) == (text + image) / 2


def test_counting_needs_no_memory():
    assert flops(load("mot_7b", device="meta"), sequence_length=8).total > 0
    assert total_params(MODELS.get("mot_7b")()) == 13_489_426_432


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": torch.zeros(1, 2, dtype=torch.long), "sequence_length": 4}, "pass either batch or sequence_length"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"batch": {"labels": torch.zeros(1, 2)}}, "needs input_ids or modality_ids"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        flops(small("dense_nano"), **given)


def test_an_unknown_modality():
    with pytest.raises(ValueError, match="unknown modality 'smell'; the modalities are text, image, speech"):
        active_params(small("dense_nano"), "smell")


@pytest.fixture
def own_parts():
    @register_attention("average")
    class Average(BaseAttention):
        """Every row is left alone."""

    @register_experts("constant")
    class Constant(Experts):
        """Every row is left alone."""

    yield Average, Constant
    ATTENTIONS.remove("average")
    EXPERTS.remove("constant")


def test_own_parts_must_say_what_they_cost(own_parts):
    average, constant = own_parts
    with pytest.raises(TypeError, match="give it projection_params"):
        flops(small("dense_nano").replace(attention=average.Config()), sequence_length=4)
    with pytest.raises(TypeError, match="give it active_params"):
        active_params(small("dense_nano").replace(experts=constant.Config()))


def test_own_parts_that_do():
    @dataclass(frozen=True, kw_only=True)
    class Config(BaseAttention.Config):
        def projection_params(self, hidden_size):
            return hidden_size

        def mixing_flops(self, hidden_size, length):
            return hidden_size * length

    config = small("dense_nano").replace(num_layers=1, attention=Config())
    found = flops(config, sequence_length=6)
    assert found.by_kind["attention_projections"] == 6 * 2 * 64
    assert found.by_kind["attention_scores"] == 6 * 64 * 6
