"""What decoders of the Llama line have in common: fields of their configs, and the table of their layers.

Configs are read through the class that transformers has for them, so that values a file leaves out get the default of
that class, and old spellings of rotary parameters the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from omnimoe.checkpoint import CheckpointError
from omnimoe.convert.rules import Rule, bank, rename
from omnimoe.experts import Experts
from omnimoe.layers import BaseAttention, Norm, Rope
from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
"""Names of transformers to ours."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NETWORK = ("gate_proj", "up_proj", "down_proj")


def read_config(plain: dict[str, Any]) -> PreTrainedConfig:
    """The config of transformers for a published one.

    Raises:
        CheckpointError: if transformers does not know its type or refuses a value, or the weights are quantised.
    """
    plain = {key: value for key, value in plain.items() if key not in ("auto_map", "architectures")}
    if plain.get("quantization_config"):
        method = plain["quantization_config"].get("quant_method", "an unknown method")
        raise CheckpointError(f"the weights are quantised ({method}), which is not converted; take a copy in bfloat16")
    try:
        return AutoConfig.for_model(plain.pop("model_type"), **plain)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the published config is refused: {error}") from error


def activation(name: str) -> str:
    """Our name of an activation.

    Raises:
        CheckpointError: if we have none such.
    """
    if name not in ACTIVATIONS:
        raise CheckpointError(f"activation {name!r} has no counterpart here; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def refuse(config: PreTrainedConfig, **wanted: Any) -> None:
    """Refuses a config that asks for what the parts here do not do.

    Args:
        config: the published one.
        wanted: the only value that a field may have, where it is there.

    Raises:
        CheckpointError: with the field and its value.
    """
    for name, value in wanted.items():
        if getattr(config, name, value) != value:
            raise CheckpointError(f"{name} is {getattr(config, name)!r}, and only {value!r} is converted")


def rope_of(config: PreTrainedConfig) -> Rope.Config:
    """Rotary positions.

    Raises:
        CheckpointError: for a scaling that depends on the length of the sequence.
    """
    given = dict(config.rope_parameters)
    kind = given.pop("rope_type", "default")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("rotary positions that turn a part of a head are not converted")
    if kind == "default":
        return Rope.Config(theta=float(given["rope_theta"]))
    raise CheckpointError(f"rotary scaling {kind!r} is not converted; known: default")


def decoder_config(
    config: PreTrainedConfig, *, attention: BaseAttention.Config, experts: Experts.Config, **changes: Any
) -> OmniMoeConfig:
    """The fields that all of them share.

    Args:
        config: the published one, read.
        attention: of every layer.
        experts: of every layer.
        changes: further fields of ours.
    """
    norm = Norm.Config(eps=config.rms_norm_eps)
    return OmniMoeConfig(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        modalities=(Tokens.Config(name="text", vocab_size=config.vocab_size),),
        attention=attention,
        experts=experts,
        norm=norm,
        final_norm=norm,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        max_position_embeddings=config.max_position_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        **changes,
    )


def outer_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """Embedding, final norm and head."""
    yield rename("model.embed_tokens.weight", "model.embed_tokens.weight")
    yield bank("model.norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield rename("lm_head.weight", "lm_head.weight")


def tied_head(config: OmniMoeConfig) -> dict[str, str]:
    """The head that some files hold although it is the embedding."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def layers(config: OmniMoeConfig) -> Iterator[tuple[str, str, Any]]:
    """The published prefix, our prefix and the config of each layer."""
    for index, block in enumerate(config.blocks):
        yield f"model.layers.{index}", f"model.backbone.layers.{index}", block


def norm_rules(theirs: str, ours: str) -> Iterator[Rule]:
    """Both norms of a layer."""
    yield bank(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight")
    yield bank(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight")


def attention_rules(theirs: str, ours: str, attention: Any) -> Iterator[Rule]:
    """Grouped-query attention, with biases and norms where it has them."""
    for site in ATTENTION:
        yield bank(f"{ours}.self_attn.{site}.weight", f"{theirs}.self_attn.{site}.weight")
        if attention.output_bias if site == "o_proj" else attention.bias:
            yield bank(f"{ours}.self_attn.{site}.bias", f"{theirs}.self_attn.{site}.bias")
    if attention.qk_norm != "none":
        for site in ("q_norm", "k_norm"):
            yield bank(f"{ours}.self_attn.{site}.weight", f"{theirs}.self_attn.{site}.weight")


def network_rules(theirs: tuple[str, ...] | str, ours: str, names: tuple[str, str, str] = NETWORK) -> Iterator[Rule]:
    """A bank of gated networks.

    Args:
        theirs: the published prefix of each copy.
        ours: our prefix of the bank.
        names: of gate, up and down.
    """
    prefixes = (theirs,) if isinstance(theirs, str) else theirs
    gate, up, down = names
    yield bank(f"{ours}.gate_up_proj", *((f"{held}.{gate}.weight", f"{held}.{up}.weight") for held in prefixes))
    yield bank(f"{ours}.down_proj", *(f"{held}.{down}.weight" for held in prefixes))
