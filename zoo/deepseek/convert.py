"""Checkpoints of DeepSeek-V3's architecture: latent attention, groups of experts, a bias that moves the choice alone.

Their rotary positions turn neighbouring numbers of a head, ours its halves, so rows of queries and keys change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omnimoe import FeedForward, LatentAttention, LayerRange, OmniMoeConfig, RoutedExperts
from omnimoe.convert import Converter, Deinterleave, Rule, bank, register_converter, rename
from omnimoe.convert.changes import AS_IS
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, decoder_config, read_config, rope_of, top_k_router
from omnimoe.convert.tables import (
    ROTARY_TABLES,
    layers,
    mixture_rules,
    network_rules,
    norm_rules,
    outer_rules,
    tied_head,
)
from omnimoe.layers.rope_scaling import yarn_sharpness


def deepseek_v3_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    stretched = config.rope_parameters if config.rope_parameters.get("rope_type", "default") != "default" else {}
    sharpness = 1.0
    if stretched.get("mscale_all_dim"):
        sharpness = yarn_sharpness(stretched["factor"], stretched["mscale_all_dim"]) ** 2
    network: dict[str, Any] = {"activation": activation(config.hidden_act)}
    dense = FeedForward.Config(intermediate_size=config.intermediate_size, **network)
    num_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    return decoder_config(
        config,
        attention=LatentAttention.Config(
            num_heads=config.num_attention_heads,
            query_rank=config.q_lora_rank,
            latent_rank=config.kv_lora_rank,
            plain_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            sharpness=sharpness,
            rope=rope_of(config),
        ),
        experts=RoutedExperts.Config(
            num_experts=config.n_routed_experts,
            intermediate_size=config.moe_intermediate_size,
            num_shared_experts=config.n_shared_experts,
            router=top_k_router(
                config,
                score="sigmoid",
                routed_scaling_factor=config.routed_scaling_factor,
                num_groups=config.n_group,
                num_groups_kept=config.topk_group,
                expert_bias="shared",
                load_balance_coef=0.0,
            ),
            **network,
        ),
        layers=(LayerRange(stop=num_dense, experts=dense),) if num_dense else (),
    )


def deepseek_v3_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield from outer_rules(config)
    for theirs, ours, block in layers(config):
        yield from norm_rules(theirs, ours)
        yield from _attention_rules(f"{theirs}.self_attn", f"{ours}.self_attn", config)
        if isinstance(block.experts, RoutedExperts.Config):
            yield from mixture_rules(f"{theirs}.mlp", f"{ours}.mlp", block.experts)
            yield rename(f"{ours}.mlp.router.expert_bias", f"{theirs}.mlp.gate.e_score_correction_bias")
            yield from network_rules(f"{theirs}.mlp.shared_experts", f"{ours}.mlp.shared_experts")
        else:
            yield from network_rules(f"{theirs}.mlp", f"{ours}.mlp.experts")


def _attention_rules(theirs: str, ours: str, config: OmniMoeConfig) -> Iterator[Rule]:
    attention = config.attention
    assert isinstance(attention, LatentAttention.Config)
    turns_neighbours = config.published["files"][CONFIG].get("rope_interleave", True)
    head, kept = attention.plain_dim + attention.rope_dim, attention.latent_rank + attention.rope_dim
    of_heads = Deinterleave(head, attention.plain_dim) if turns_neighbours else AS_IS
    of_key = Deinterleave(kept, attention.latent_rank) if turns_neighbours else AS_IS
    if attention.query_rank is None:
        yield bank(f"{ours}.q_proj.weight", f"{theirs}.q_proj.weight", change=of_heads)
    else:
        yield bank(f"{ours}.q_down_proj.weight", f"{theirs}.q_a_proj.weight")
        yield bank(f"{ours}.q_norm.weight", f"{theirs}.q_a_layernorm.weight")
        yield bank(f"{ours}.q_up_proj.weight", f"{theirs}.q_b_proj.weight", change=of_heads)
    yield bank(f"{ours}.kv_down_proj.weight", f"{theirs}.kv_a_proj_with_mqa.weight", change=of_key)
    yield bank(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight")
    yield bank(f"{ours}.kv_up_proj.weight", f"{theirs}.kv_b_proj.weight")
    yield bank(f"{ours}.o_proj.weight", f"{theirs}.o_proj.weight")
    if attention.bias:
        if attention.query_rank is not None:
            yield bank(f"{ours}.q_down_proj.bias", f"{theirs}.q_a_proj.bias")
        yield bank(f"{ours}.kv_down_proj.bias", f"{theirs}.kv_a_proj_with_mqa.bias", change=of_key)
        yield bank(f"{ours}.o_proj.bias", f"{theirs}.o_proj.bias")


def _ignored(config: OmniMoeConfig) -> Mapping[str, str]:
    """The layers behind the last, which guess further tokens."""
    return {
        **ROTARY_TABLES,
        rf"model\.layers\.{config.num_layers}\..*": "the layer that predicts a token more, for speculative decoding",
    }


DEEPSEEK_V3 = register_converter(
    Converter(
        name="deepseek_v3",
        model_types=("deepseek_v3",),
        config=deepseek_v3_config,
        rules=deepseek_v3_rules,
        tied=tied_head,
        ignored=_ignored,
    )
)
