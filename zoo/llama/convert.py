"""Llama's checkpoints: the plainest table, a bank of one at every site."""

from __future__ import annotations

from omnimoe import Attention, FeedForward, OmniMoeConfig
from omnimoe.convert import Converter, register_converter
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, decoder_config, read_config, refuse, rope_of
from omnimoe.convert.tables import ROTARY_TABLES, dense_rules, tied_head


def llama_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    refuse(config, mlp_bias=False)
    return decoder_config(
        config,
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            rope=rope_of(config),
        ),
        experts=FeedForward.Config(
            intermediate_size=config.intermediate_size, activation=activation(config.hidden_act)
        ),
    )


LLAMA = register_converter(
    Converter(
        name="llama",
        model_types=("llama",),
        config=llama_config,
        rules=dense_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
