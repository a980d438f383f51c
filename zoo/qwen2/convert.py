"""Checkpoints of Qwen2 and Qwen2.5, and of Qwen1.5-MoE and Qwen2-MoE, whose shared expert has a gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omnimoe import Attention, FeedForward, OmniMoeConfig, RoutedExperts
from omnimoe.convert import Converter, Rule, register_converter
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


def qwen2_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    refuse(config, use_sliding_window=False)
    return decoder_config(
        config,
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            bias=True,
            rope=rope_of(config),
        ),
        experts=FeedForward.Config(
            intermediate_size=config.intermediate_size, activation=activation(config.hidden_act)
        ),
    )


def qwen2_moe_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    refuse(config, use_sliding_window=False)
    network: dict[str, Any] = {"activation": activation(config.hidden_act)}
    return decoder_config(
        config,
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            bias=config.qkv_bias,
            rope=rope_of(config),
        ),
        experts=RoutedExperts.Config(
            num_experts=config.num_experts,
            intermediate_size=config.moe_intermediate_size,
            num_shared_experts=1,
            shared_intermediate_size=config.shared_expert_intermediate_size,
            shared_gate="sigmoid",
            router=top_k_router(config),
            **network,
        ),
        layers=dense_layers(config, FeedForward.Config(intermediate_size=config.intermediate_size, **network)),
    )


def qwen2_moe_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table: experts beside one shared expert."""
    return routed_rules(config, shared="shared_expert", shared_gate="shared_expert_gate")


QWEN2 = register_converter(
    Converter(
        name="qwen2",
        model_types=("qwen2",),
        config=qwen2_config,
        rules=dense_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
QWEN2_MOE = register_converter(
    Converter(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        config=qwen2_moe_config,
        rules=qwen2_moe_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
