"""Mixtral's checkpoints: experts called ``w1`` (gate), ``w3`` (up) and ``w2`` (down), one by one."""

from __future__ import annotations

from collections.abc import Iterator

from omnimoe import Attention, OmniMoeConfig, RoutedExperts
from omnimoe.convert import Converter, Rule, register_converter
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, decoder_config, read_config, refuse, rope_of, top_k_router
from omnimoe.convert.tables import ROTARY_TABLES, routed_rules, tied_head


def mixtral_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    refuse(config, sliding_window=None)
    return decoder_config(
        config,
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope=rope_of(config),
        ),
        experts=RoutedExperts.Config(
            num_experts=config.num_local_experts,
            intermediate_size=config.intermediate_size,
            activation=activation(config.hidden_act),
            router=top_k_router(config, input_jitter=config.router_jitter_noise),
        ),
    )


def mixtral_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    return routed_rules(config, mlp="block_sparse_moe", names=("w1", "w3", "w2"))


MIXTRAL = register_converter(
    Converter(
        name="mixtral",
        model_types=("mixtral",),
        config=mixtral_config,
        rules=mixtral_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
