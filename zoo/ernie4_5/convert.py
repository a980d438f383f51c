"""Checkpoints of ERNIE 4.5's text models, dense and mixtures of experts.

Their rotary positions turn neighbouring numbers of a head, ours its halves, so rows of queries and keys change places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from omnimoe import Attention, FeedForward, LayerRange, OmniMoeConfig, RoutedExperts
from omnimoe.checkpoint import CheckpointError
from omnimoe.convert import Converter, Deinterleave, Reshape, Rule, bank, register_converter, rename
from omnimoe.convert.changes import AS_IS
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, decoder_config, read_config, refuse, rope_of, top_k_router
from omnimoe.convert.tables import (
    ATTENTION,
    ROTARY_TABLES,
    layers,
    mixture_rules,
    network_rules,
    norm_rules,
    outer_rules,
    tied_head,
)


def ernie4_5_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one of a dense model."""
    config = read_config(files[CONFIG])
    refuse(config, use_bias=False)
    return decoder_config(config, attention=_attention(config), experts=_dense(config))


def ernie4_5_moe_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one of a mixture of experts."""
    config = read_config(files[CONFIG])
    refuse(config, use_bias=False)
    if config.moe_k < 2:
        raise CheckpointError(f"moe_k is {config.moe_k}, and routers that take two or more experts are converted")
    start, stop = config.moe_layer_start_index, config.moe_layer_end_index
    dense = [
        layer
        for layer in range(config.num_hidden_layers)
        if (layer + 1) % config.moe_layer_interval or not start <= layer <= stop
    ]
    return decoder_config(
        config,
        attention=_attention(config),
        experts=RoutedExperts.Config(
            num_experts=config.moe_num_experts,
            intermediate_size=config.moe_intermediate_size,
            activation=activation(config.hidden_act),
            num_shared_experts=config.moe_num_shared_experts or 0,
            router=top_k_router(config, normalize_min=config.moe_norm_min, expert_bias="shared", keep_float32=True),
        ),
        layers=tuple(LayerRange(start=layer, stop=layer + 1, experts=_dense(config)) for layer in dense),
    )


def _attention(config: PreTrainedConfig) -> Attention.Config:
    return Attention.Config(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        rope=rope_of(config),
    )


def _dense(config: PreTrainedConfig) -> FeedForward.Config:
    return FeedForward.Config(intermediate_size=config.intermediate_size, activation=activation(config.hidden_act))


def ernie4_5_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table of both."""
    yield from outer_rules(config)
    for theirs, ours, block in layers(config):
        yield from norm_rules(theirs, ours)
        yield from turned_rules(theirs, ours, config)
        experts: Any = block.experts
        if not isinstance(experts, RoutedExperts.Config):
            yield from network_rules(f"{theirs}.mlp", f"{ours}.mlp.experts")
            continue
        yield from mixture_rules(f"{theirs}.mlp", f"{ours}.mlp", experts)
        bias, count = f"{theirs}.mlp.moe_statics.e_score_correction_bias", experts.num_experts
        yield rename(f"{ours}.mlp.router.expert_bias", bias, change=Reshape((1, count), (count,)))
        if experts.num_shared_experts:
            yield from network_rules(f"{theirs}.mlp.shared_experts", f"{ours}.mlp.shared_experts")


def turned_rules(theirs: str, ours: str, config: OmniMoeConfig) -> Iterator[Rule]:
    """Attention whose published heads turn neighbouring numbers."""
    turned = Deinterleave(config.head_dim)
    for site in ATTENTION:
        change = turned if site in ("q_proj", "k_proj") else AS_IS
        yield bank(f"{ours}.self_attn.{site}.weight", f"{theirs}.self_attn.{site}.weight", change=change)


ERNIE4_5 = register_converter(
    Converter(
        name="ernie4_5",
        model_types=("ernie4_5",),
        config=ernie4_5_config,
        rules=ernie4_5_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
ERNIE4_5_MOE = register_converter(
    Converter(
        name="ernie4_5_moe",
        model_types=("ernie4_5_moe",),
        config=ernie4_5_moe_config,
        rules=ernie4_5_rules,
        tied=tied_head,
        ignored={
            **ROTARY_TABLES,
            r"model\.mtp_.*": "the layer that predicts a token more, for speculative decoding",
        },
        optional={"correction biases of its routers": r".*\.moe_statics\.e_score_correction_bias"},
    )
)
