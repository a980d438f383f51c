"""gpt-oss's checkpoints: all experts of a layer in one tensor, ``(in, out)``, gate and up in turns."""

from __future__ import annotations

from collections.abc import Iterator

from omnimoe import LayerRange, OmniMoeConfig, RoutedExperts, SinkAttention
from omnimoe.checkpoint import CheckpointError
from omnimoe.convert import Chain, Converter, Deinterleave, Rule, Transpose, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import decoder_config, read_config, refuse, rope_of, top_k_router
from omnimoe.convert.tables import ROTARY_TABLES, attention_rules, layers, norm_rules, outer_rules, tied_head

KINDS = ("full_attention", "sliding_attention")


def gpt_oss_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    refuse(config, hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0)
    unknown = sorted(set(config.layer_types) - set(KINDS))
    if unknown:
        raise CheckpointError(f"layers of kind {unknown[0]!r} are not converted; known: {', '.join(KINDS)}")
    attention = SinkAttention.Config(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        output_bias=config.attention_bias,
        rope=rope_of(config),
    )
    narrow = attention.replace(window=config.sliding_window)
    sliding = [layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    return decoder_config(
        config,
        attention=attention,
        experts=RoutedExperts.Config(
            num_experts=config.num_local_experts,
            intermediate_size=config.intermediate_size,
            activation="clamped_silu",
            bias=True,
            # a softmax over what was chosen is that over all, brought to a sum of one
            router=top_k_router(config, normalize=True, logit_bias=True),
        ),
        layers=_ranges(sliding, config.num_hidden_layers, narrow),
    )


def _ranges(chosen: list[int], count: int, attention: SinkAttention.Config) -> tuple[LayerRange, ...]:
    """The chosen layers of ``count``: one range where every second is."""
    if chosen and chosen == list(range(chosen[0], count, 2)):
        return (LayerRange(start=chosen[0], step=2, attention=attention),)
    return tuple(LayerRange(start=layer, stop=layer + 1, attention=attention) for layer in chosen)


def gpt_oss_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield from outer_rules(config)
    for theirs, ours, block in layers(config):
        yield from norm_rules(theirs, ours)
        yield from attention_rules(theirs, ours, block.attention)
        yield rename(f"{ours}.self_attn.sinks", f"{theirs}.self_attn.sinks")
        for kind in ("weight", "bias"):
            yield rename(f"{ours}.mlp.router.scorer.{kind}", f"{theirs}.mlp.router.{kind}")
        into = Chain((Transpose(), Deinterleave(axis=1)))
        yield rename(f"{ours}.mlp.experts.gate_up_proj", f"{theirs}.mlp.experts.gate_up_proj", change=into)
        biases = Deinterleave(axis=1)
        yield rename(f"{ours}.mlp.experts.gate_up_bias", f"{theirs}.mlp.experts.gate_up_proj_bias", change=biases)
        yield rename(f"{ours}.mlp.experts.down_proj", f"{theirs}.mlp.experts.down_proj", change=Transpose())
        yield rename(f"{ours}.mlp.experts.down_bias", f"{theirs}.mlp.experts.down_proj_bias")


GPT_OSS = register_converter(
    Converter(
        name="gpt_oss",
        model_types=("gpt_oss",),
        config=gpt_oss_config,
        rules=gpt_oss_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
    )
)
