"""Checkpoints of Qwen3 and Qwen3-MoE: a norm on the queries and keys of every head, no biases."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from omnimoe import Attention, FeedForward, OmniMoeConfig, RoutedExperts
from omnimoe.convert import Converter, register_converter
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import (
    activation,
    decoder_config,
    dense_layers,
    read_config,
    refuse,
    rope_of,
    top_k_router,
)
from omnimoe.convert.tables import ROTARY_TABLES, dense_rules, routed_rules, tied_head


def _attention(config: PreTrainedConfig) -> Attention.Config:
    refuse(config, use_sliding_window=False)
    return Attention.Config(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm="rms",
        qk_norm_eps=config.rms_norm_eps,
        rope=rope_of(config),
    )


def qwen3_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    return decoder_config(
        config,
        attention=_attention(config),
        experts=FeedForward.Config(
            intermediate_size=config.intermediate_size, activation=activation(config.hidden_act)
        ),
    )


def qwen3_moe_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    network: dict[str, Any] = {"activation": activation(config.hidden_act)}
    return decoder_config(
        config,
        attention=_attention(config),
        experts=RoutedExperts.Config(
            num_experts=config.num_experts,
            intermediate_size=config.moe_intermediate_size,
            router=top_k_router(config),
            **network,
        ),
        layers=dense_layers(config, FeedForward.Config(intermediate_size=config.intermediate_size, **network)),
    )


QWEN3 = register_converter(
    Converter(
        name="qwen3",
        model_types=("qwen3",),
        config=qwen3_config,
        rules=dense_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
QWEN3_MOE = register_converter(
    Converter(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        config=qwen3_moe_config,
        rules=routed_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
