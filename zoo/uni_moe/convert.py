"""Checkpoints of Uni-MoE and of Uni-MoE-2.0: the language model, on LLaMA and on Qwen2.5.

The experts of the first may have the names that DeepSpeed gives them. Towers, projectors and generators have no place
here and go along where a folder is converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omnimoe import Attention, CheckpointError, OmniMoeConfig, Rope, RoutedExperts
from omnimoe.convert import Converter, Rule, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, decoder_config, read_config, refuse, rope_of, top_k_router
from omnimoe.convert.tables import (
    ROTARY_TABLES,
    attention_rules,
    layers,
    network_rules,
    norm_rules,
    outer_rules,
    routed_rules,
    tied_head,
)
from omnimoe.routers import SparseMixerRouter, TopKRouter

KEPT = {r"(?!(model\.(embed_tokens|layers|norm)|lm_head)\.).*": "uni_moe_rest.safetensors"}
"""What is no part of the language model, which goes along."""
REAL = "dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts"
"""Published name of the wide experts of 2.0."""
_ONLY_HERE = {"num_experts": 4, "num_experts_per_tok": 2}
_GRIN: dict[str, Any] = {
    "mlp_dynamic_expert_num": 4,
    "mlp_dynamic_null_expert_num": 0,
    "mlp_dynamic_top_p": 0.7,
    "mlp_dynamic_top_k": 2,
    "mlp_fixed_expert_num": 2,
    "dynamic_intermediate_size": 8960,
    "shared_intermediate_size": 8960,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
}
"""Fields that Qwen2's config does not have, with the authors' defaults."""
_WANTED = {"token_drop": False, "use_sliding_window": False}


def uni_moe_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one: LLaMA's, with the number of experts."""
    plain = files[CONFIG]
    own = {name: plain.get(name, value) for name, value in _ONLY_HERE.items()}
    config = read_config({**_without(plain, _ONLY_HERE), "model_type": "llama"})
    refuse(config, attention_bias=False, mlp_bias=False)
    for name, value in own.items():
        setattr(config, name, value)
    return decoder_config(
        config,
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope=rope_of(config),
        ),
        experts=RoutedExperts.Config(
            num_experts=own["num_experts"],
            intermediate_size=config.intermediate_size,
            activation=activation(config.hidden_act),
            router=top_k_router(config),
        ),
    )


def uni_moe_2_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one: that of Qwen2-VL's language model, with what the authors add."""
    plain = files[CONFIG]
    for name, value in _WANTED.items():
        if plain.get(name, value) != value:
            raise CheckpointError(f"{name} is {plain[name]!r}, and only {value!r} is converted")
    grin = {name: plain.get(name, value) for name, value in _GRIN.items()}
    taken = _without(plain, {**_GRIN, "rope_scaling": None, "vision_config": None, "audio_config": None})
    config = read_config({**taken, "model_type": "qwen2", "intermediate_size": grin["dynamic_intermediate_size"]})
    scaling = plain.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("mrope", "default"):
        raise CheckpointError(f"rotary scaling {kind!r} is not converted; known: mrope, default")
    return decoder_config(
        config,
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            bias=True,
            rope=Rope.Config(theta=rope_of(config).theta, sections=tuple(scaling.get("mrope_section", ()))),
        ),
        experts=RoutedExperts.Config(
            num_experts=grin["mlp_dynamic_expert_num"],
            intermediate_size=grin["dynamic_intermediate_size"],
            activation=activation(config.hidden_act),
            router=_sparse_mixer(grin),
            num_zero_experts=grin["mlp_dynamic_null_expert_num"],
            num_shared_experts=grin["mlp_fixed_expert_num"],
            shared_intermediate_size=grin["shared_intermediate_size"] if grin["mlp_fixed_expert_num"] else None,
            shared_gate="softmax" if grin["mlp_fixed_expert_num"] else "none",
        ),
    )


def _without(plain: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name not in names}


def _sparse_mixer(grin: Mapping[str, Any]) -> TopKRouter.Config:
    count, share = grin["mlp_dynamic_expert_num"] + grin["mlp_dynamic_null_expert_num"], grin["mlp_dynamic_top_p"]
    return SparseMixerRouter.Config(
        top_k=count if share else grin["mlp_dynamic_top_k"],
        top_p=share or None,
        nearness=2 * grin["router_jitter_noise"],
        input_jitter=grin["input_jitter_noise"],
        load_balance_coef=0.0,
    )


def uni_moe_2_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield from outer_rules(config)
    for theirs, ours, block in layers(config):
        yield from norm_rules(theirs, ours)
        yield from attention_rules(theirs, ours, block.attention)
        yield rename(f"{ours}.mlp.router.scorer.weight", f"{theirs}.mlp.gate.weight")
        wide = tuple(f"{theirs}.mlp.{REAL}.{expert}" for expert in range(block.experts.num_experts))
        yield from network_rules(wide, f"{ours}.mlp.experts")
        if block.experts.num_shared_experts:
            narrow = tuple(
                f"{theirs}.mlp.fixed_real_moe.{expert}" for expert in range(block.experts.num_shared_experts)
            )
            yield from network_rules(narrow, f"{ours}.mlp.shared_experts")


UNI_MOE = register_converter(
    Converter(
        name="uni_moe",
        model_types=("uni_moe",),
        config=uni_moe_config,
        rules=routed_rules,
        tied=tied_head,
        spellings={r"^(model\.layers\.\d+\.mlp\.)deepspeed_moe\.experts\.deepspeed_(experts\.)": r"\1\2"},
        ignored=ROTARY_TABLES,
        kept=KEPT,
    )
)
UNI_MOE_2 = register_converter(
    Converter(
        name="uni_moe_2",
        model_types=("grin_qwen2_vl", "grin_qwen2_vl_out", "UniMoEV2_qwen2_vl"),
        config=uni_moe_2_config,
        rules=uni_moe_2_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
        kept=KEPT,
    )
)

__all__ = ["UNI_MOE", "UNI_MOE_2"]
