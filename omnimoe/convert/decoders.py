"""Published configs of decoders of the Llama line, and the fields of ours that they have in common.

They are read through the class that transformers has for them, so that values a file leaves out get the default of that
class, and old spellings of rotary parameters the new one.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from omnimoe.backbone import LayerRange
from omnimoe.checkpoint import CheckpointError
from omnimoe.experts import Experts
from omnimoe.layers import BaseAttention, Norm, Rope
from omnimoe.layers.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling, yarn_sharpness
from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeConfig
from omnimoe.routers import TopKRouter

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
"""Names of transformers to ours."""


def read_config(plain: dict[str, Any]) -> PreTrainedConfig:
    """The config of transformers for a published one.

    Raises:
        CheckpointError: if transformers does not know its type or refuses a value, or the weights are quantised.
    """
    plain = {key: value for key, value in plain.items() if key not in ("auto_map", "architectures")}
    quantised = plain.get("quantization_config")
    if quantised:
        known = quantised if isinstance(quantised, dict) else {}
        method = known.get("quant_method", "an unknown method")
        raise CheckpointError(f"the weights are quantised ({method}), which is not converted; take a copy in bfloat16")
    for name in ("dtype", "torch_dtype"):
        if not isinstance(plain.get(name), str | None):
            raise CheckpointError(f"the published config is refused: {name} {plain[name]!r} is no name of a dtype")
    try:
        return AutoConfig.for_model(plain.pop("model_type"), **plain)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
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
    theta = float(given["rope_theta"])
    if kind == "default":
        return Rope.Config(theta=theta)
    known = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
    if kind not in known:
        raise CheckpointError(
            f"rotary scaling {kind!r} is not converted; known: default, {', '.join(known)}. 'dynamic' and 'longrope' "
            "change with the length of the sequence, which a cache does not follow; drop rope_scaling from the config "
            "to read sequences of the first length"
        )
    return Rope.Config(theta=theta, scaling=known[kind](given, config))


def _linear(given: dict[str, Any], config: PreTrainedConfig) -> RopeScaling.Config:
    return LinearScaling.Config(factor=float(given["factor"]))


def _llama3(given: dict[str, Any], config: PreTrainedConfig) -> RopeScaling.Config:
    return Llama3Scaling.Config(
        factor=float(given["factor"]),
        low_freq_factor=float(given["low_freq_factor"]),
        high_freq_factor=float(given["high_freq_factor"]),
        original_length=int(given["original_max_position_embeddings"]),
    )


def _yarn(given: dict[str, Any], config: PreTrainedConfig) -> RopeScaling.Config:
    length = int(given["original_max_position_embeddings"])
    factor = float(given.get("factor") or config.max_position_embeddings / length)
    sharpness = given.get("attention_factor")
    strength, whole = given.get("mscale"), given.get("mscale_all_dim")
    if sharpness is None and strength and whole:
        sharpness = yarn_sharpness(factor, strength) / yarn_sharpness(factor, whole)
    return YarnScaling.Config(
        factor=factor,
        original_length=length,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=sharpness,
    )


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


def top_k_router(config: PreTrainedConfig, **changes: Any) -> TopKRouter.Config:
    """Token choice as Mixtral, OLMoE and the Qwens have it.

    Args:
        config: the published one, read; ``norm_topk_prob`` counts as true where it is no field.
        changes: fields of ours to set.
    """
    fields = {
        "top_k": config.num_experts_per_tok,
        "normalize": getattr(config, "norm_topk_prob", True),
        "load_balance_coef": getattr(config, "router_aux_loss_coef", 0.0),
        "load_balance_form": "choices_per_token",
    }
    return TopKRouter.Config(**{**fields, **changes})


def dense_layers(config: PreTrainedConfig, experts: Experts.Config) -> tuple[LayerRange, ...]:
    """The layers that keep one network among layers of experts.

    Args:
        config: the published one, read: ``mlp_only_layers`` and ``decoder_sparse_step``.
        experts: of those layers.
    """
    step = config.decoder_sparse_step
    dense = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer in config.mlp_only_layers or (layer + 1) % step or not config.num_experts
    ]
    return tuple(LayerRange(start=layer, stop=layer + 1, experts=experts) for layer in dense)
