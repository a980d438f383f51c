"""Mamba's checkpoints in the layout of transformers: a bank of one at every site."""

from __future__ import annotations

from collections.abc import Iterator

from omnimoe import NoExperts, Norm, OmniMoeConfig, StateSpace, Tokens
from omnimoe.convert import Converter, register_converter
from omnimoe.convert.changes import Reshape
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import read_config, refuse
from omnimoe.convert.rules import Rule, bank, rename

LENGTH = 2048
"""Tokens of a sequence that the published models were trained on, which their configs do not say."""


def mamba_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config(files[CONFIG])
    refuse(config, hidden_act="silu", intermediate_size=int(config.expand) * config.hidden_size)
    norm = Norm.Config(eps=config.layer_norm_epsilon)
    return OmniMoeConfig(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        modalities=(Tokens.Config(name="text", vocab_size=config.vocab_size),),
        attention=StateSpace.Config(
            state_size=config.state_size,
            conv_size=config.conv_kernel,
            expand=int(config.expand),
            step_rank=config.time_step_rank,
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            step_min=config.time_step_min,
            step_max=config.time_step_max,
            step_floor=config.time_step_floor,
        ),
        experts=NoExperts.Config(),
        norm=norm,
        final_norm=norm,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        max_position_embeddings=LENGTH,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def mamba_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield rename("model.embed_tokens.weight", "backbone.embeddings.weight")
    yield bank("model.norm.weight", "backbone.norm_f.weight")
    if not config.tie_word_embeddings:
        yield rename("lm_head.weight", "lm_head.weight")
    for index, block in enumerate(config.blocks):
        mixer, theirs = block.attention, f"backbone.layers.{index}"
        if not isinstance(mixer, StateSpace.Config):
            raise TypeError(
                f"layer {index} is {type(mixer).__qualname__}, and only state spaces have a place in the table"
            )
        ours, published = f"model.backbone.layers.{index}", f"{theirs}.mixer"
        yield bank(f"{ours}.attention_norm.weight", f"{theirs}.norm.weight")
        for site in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            yield bank(f"{ours}.self_attn.{site}.weight", f"{published}.{site}.weight")
            if site == "dt_proj" or (mixer.bias and site != "x_proj"):
                yield bank(f"{ours}.self_attn.{site}.bias", f"{published}.{site}.bias")
        channels, size = mixer.expand * config.hidden_size, mixer.conv_size
        kernel = Reshape((channels, 1, size), (channels, size))
        yield rename(f"{ours}.self_attn.conv.weight", f"{published}.conv1d.weight", change=kernel)
        if mixer.conv_bias:
            yield rename(f"{ours}.self_attn.conv.bias", f"{published}.conv1d.bias")
        yield rename(f"{ours}.self_attn.rates.A_log", f"{published}.A_log")
        yield rename(f"{ours}.self_attn.rates.D", f"{published}.D")


def tied_head(config: OmniMoeConfig) -> dict[str, str]:
    """The head that some files hold although it is the embedding."""
    return {"lm_head.weight": "backbone.embeddings.weight"} if config.tie_word_embeddings else {}


MAMBA = register_converter(
    Converter(
        name="mamba",
        model_types=("mamba",),
        config=mamba_config,
        rules=mamba_rules,
        tied=tied_head,
        spellings={r"backbone\.embedding\.weight": "backbone.embeddings.weight"},
    )
)
