"""OLMoE's checkpoints: one norm over all queries and one over all keys."""

from __future__ import annotations

from omnimoe import Attention, OmniMoeConfig, RoutedExperts
from omnimoe.convert import Converter, register_converter
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, decoder_config, read_config, refuse, rope_of, top_k_router
from omnimoe.convert.tables import ROTARY_TABLES, routed_rules, tied_head


def olmoe_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    refuse(config, clip_qkv=None)
    return decoder_config(
        config,
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm="rms_joint",
            qk_norm_eps=config.rms_norm_eps,
            rope=rope_of(config),
        ),
        experts=RoutedExperts.Config(
            num_experts=config.num_experts,
            intermediate_size=config.intermediate_size,
            activation=activation(config.hidden_act),
            router=top_k_router(config),
        ),
    )


OLMOE = register_converter(
    Converter(
        name="olmoe",
        model_types=("olmoe",),
        config=olmoe_config,
        rules=routed_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
