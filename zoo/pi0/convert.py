"""Checkpoints of pi0: PaliGemma, a narrower Gemma for actions, and the maps of states and actions in and out.

Names are those of the checkpoints that lerobot publishes. Files of openpi (without the prefix ``model.``), of lerobot
with transformers before 4.52 and of transformers' own class are read by the same table; they are written back with the
names that lerobot publishes, which transformers reads too. A head of the action tower over words, which the files
carry, is read by nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omnimoe import Attention, CheckpointError, FeedForward, Norm, OmniMoeConfig, Tokens
from omnimoe.connectors import Linear
from omnimoe.convert import Chain, Converter, Permute, Reshape, Rule, bank, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, read_config, refuse, rope_of
from omnimoe.convert.tables import ATTENTION, network_rules, siglip_rules
from omnimoe.encoders.siglip import Siglip
from omnimoe.modalities import Connected, Trajectory

TOWERS = (0, 0, 1, 1)
"""Text and pictures meet PaliGemma, states and actions the narrower tower."""
SEEN, STATE, ACTION = 100, 101, 102
"""Ids that stand at the positions of pictures, states and actions: ``<unused93>`` to ``<unused95>`` of Gemma's words.
The id that transformers puts there, 257152, lies outside of the table."""
NORMALIZER = "policy_preprocessor_step_*_normalizer_processor.safetensors"
"""Where lerobot keeps the scales of a robot; the number of the step differs."""
OWN_NORMALIZER = "policy_normalizer.safetensors"
"""Where a converted folder keeps the scales that earlier files of lerobot hold among their weights."""
BESIDE = (
    "policy_preprocessor.json",
    NORMALIZER,
    "policy_postprocessor.json",
    "policy_postprocessor_step_*_unnormalizer_processor.safetensors",
    "processor_config.json",
)
"""Files with the scales of a robot."""
SCALES = r"(?:un)?normalize_(?:inputs|targets|outputs)\.buffer_.+"
"""The scales in earlier files of lerobot, beside the model and not below it."""
PREFIX = "model.paligemma_with_expert."
VARIANTS = {
    "gemma_2b": {"hidden_size": 2048, "intermediate_size": 16_384},
    "gemma_300m": {"hidden_size": 1024, "intermediate_size": 4096},
}
"""Towers by the names that openpi and lerobot give them."""
SPELLINGS = {
    r"^(?!model\.|(?:un)?normalize_)": "model.",
    r"\.paligemma\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)": ".paligemma.model.",
    r"\.paligemma\.model\.language_model\.lm_head\.": ".paligemma.lm_head.",
    r"\.paligemma\.model\.language_model\.model\.": ".paligemma.model.language_model.",
    r"\.vision_tower\.(?!vision_model\.)": ".vision_tower.vision_model.",
    r"\.paligemma\.model\.language_model\.embed_tokens\.": ".paligemma.lm_head.",
}


def is_pi0(plain: Mapping[str, Any]) -> bool:
    """Whether a config without a ``model_type`` is one of lerobot's or openpi's for pi0; pi0.5 is another model."""
    is_openpi = "action_horizon" in plain and "paligemma_variant" in plain
    return plain.get("type") == "pi0" or (is_openpi and not plain.get("pi05"))


def _variant(plain: Mapping[str, Any], name: str, default: str) -> dict[str, Any]:
    chosen = plain.get(name, default)
    if chosen not in VARIANTS:
        raise CheckpointError(f"{name} {chosen!r} is not known; known: {', '.join(VARIANTS)}")
    shared = {"num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
    return {"model_type": "gemma", "vocab_size": 257_152, **shared, **VARIANTS[chosen]}


def spelled_out(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config of lerobot or openpi, which names its towers, in the form that transformers has for it."""
    text = _variant(plain, "paligemma_variant", "gemma_2b")
    pixels = plain.get("image_resolution") or plain.get("resize_imgs_with_padding") or (224, 224)
    if pixels[0] != pixels[1]:
        raise CheckpointError(
            f"pictures of {pixels[0]} x {pixels[1]} pixels are no squares, and the encoder takes squares"
        )
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": pixels[0],
        "patch_size": 14,
        "vision_use_head": False,
    }
    width = text["hidden_size"]
    seen = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": width}
    numbers = plain.get("action_dim", 32)
    return {
        "model_type": "pi0",
        "vlm_config": seen,
        "dit_config": _variant(plain, "action_expert_variant", "gemma_300m"),
        "chunk_size": plain.get("chunk_size", plain.get("action_horizon", 50)),
        "max_state_dim": plain.get("max_state_dim", numbers),
        "max_action_dim": plain.get("max_action_dim", numbers),
        "min_period": plain.get("min_period", 4e-3),
        "max_period": plain.get("max_period", 4.0),
    }


def pi0_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one, in any of its three forms."""
    plain = dict(files[CONFIG])
    read = read_config(plain if plain.get("model_type") == "pi0" else spelled_out(plain))
    text, acts, vision = read.vlm_config.text_config, read.dit_config, read.vlm_config.vision_config
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    for name in ("num_hidden_layers", *heads, "rms_norm_eps", "hidden_act", "rope_parameters"):
        if getattr(text, name) != getattr(acts, name):
            raise CheckpointError(
                f"{name} is {getattr(text, name)!r} in the language tower and {getattr(acts, name)!r} in that of the "
                "actions, which attend together"
            )
    refuse(vision, vision_use_head=False)
    refuse(text, tie_word_embeddings=True, attention_bias=False)
    refuse(acts, attention_bias=False)
    norm = Norm.Config(eps=text.rms_norm_eps, offset=1.0, towers=TOWERS)
    seen = Siglip.Config(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        patch_size=vision.patch_size,
        max_side=vision.image_size // vision.patch_size,
        shortest=vision.image_size,
        eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
    )
    straight = Linear.Config(norm=False)
    return OmniMoeConfig(
        hidden_size=text.hidden_size,
        widths=(text.hidden_size, text.hidden_size, acts.hidden_size, acts.hidden_size),
        num_layers=text.num_hidden_layers,
        modalities=(
            Tokens.Config(name="text", vocab_size=text.vocab_size),
            Connected.Config(
                name="vision",
                channels=seen.hidden_size,
                connector=straight,
                encoder=seen,
                trains_encoder=True,
                num_tokens=seen.max_side**2,
                placeholder_id=SEEN,
            ),
            Connected.Config(
                name="state", channels=read.max_state_dim, connector=straight, num_tokens=1, placeholder_id=STATE
            ),
            Trajectory.Config(
                name="action",
                channels=read.max_action_dim,
                num_tokens=read.chunk_size,
                min_period=read.min_period,
                max_period=read.max_period,
                placeholder_id=ACTION,
            ),
        ),
        attention=Attention.Config(
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            rope=rope_of(text),
            towers=TOWERS,
        ),
        experts=FeedForward.Config(
            intermediate_size=text.intermediate_size,
            intermediate_sizes=(text.intermediate_size, acts.intermediate_size),
            activation=activation(text.hidden_act),
            towers=TOWERS,
        ),
        norm=norm,
        final_norm=norm,
        embedding_scale=text.hidden_size**0.5,
        tie_word_embeddings=True,
        mask="block_causal",
        bidirectional_modalities=("text", "vision", "action"),
        joint_blocks=True,
        initializer_range=text.initializer_range,
        max_position_embeddings=text.max_position_embeddings,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def pi0_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    seen, acts = f"{PREFIX}paligemma.model", f"{PREFIX}gemma_expert.model"
    words = f"{seen}.language_model"
    yield rename("model.embed_tokens.weight", f"{PREFIX}paligemma.lm_head.weight")
    for copy, theirs in enumerate((words, acts)):
        yield bank(f"model.norm.copies.{copy}.weight", f"{theirs}.norm.weight")
        for index in range(config.num_layers):
            yield from _layer_rules(f"{theirs}.layers.{index}", f"model.backbone.layers.{index}", copy)
    vision, state, action = (f"model.modalities.{name}" for name in ("vision", "state", "action"))
    encoder = config.modalities[1].encoder
    side, width = encoder.patch_size, encoder.hidden_size
    channels_last = Chain((Permute((0, 2, 3, 1)), Reshape((width, side, side, 3), (width, 3 * side**2))))
    yield from siglip_rules(encoder, f"{seen}.vision_tower.vision_model", f"{vision}.encoder", kernel=channels_last)
    for kind in ("weight", "bias"):
        yield rename(f"{vision}.connector.proj.{kind}", f"{seen}.multi_modal_projector.linear.{kind}")
        yield rename(f"{state}.connector.proj.{kind}", f"model.state_proj.{kind}")
        for way in ("in", "out"):
            ours = f"{way}_proj" if kind == "weight" else f"{way}_bias"
            yield rename(f"{action}.{ours}", f"model.action_{way}_proj.{kind}")
            yield rename(f"{action}.time_{way}.{kind}", f"model.action_time_mlp_{way}.{kind}")


def _layer_rules(theirs: str, ours: str, copy: int) -> Iterator[Rule]:
    yield bank(f"{ours}.attention_norm.copies.{copy}.weight", f"{theirs}.input_layernorm.weight")
    yield bank(f"{ours}.mlp_norm.copies.{copy}.weight", f"{theirs}.post_attention_layernorm.weight")
    for site in ATTENTION:
        yield bank(f"{ours}.self_attn.{site}.copies.{copy}.weight", f"{theirs}.self_attn.{site}.weight")
    yield from network_rules(f"{theirs}.mlp", f"{ours}.mlp.experts.copies.{copy}")


def unread(config: OmniMoeConfig) -> dict[str, tuple[int, ...]]:
    """The head of the action tower over words."""
    return {f"{PREFIX}gemma_expert.lm_head.weight": (config.vocab_size, config.width_of("action"))}


def repeated(config: OmniMoeConfig) -> dict[str, str]:
    """The embedding table that some files hold beside the head that it is."""
    table = f"{PREFIX}paligemma.model.language_model.embed_tokens.weight"
    return {table: f"{PREFIX}paligemma.lm_head.weight"}


PI0 = register_converter(
    Converter(
        name="pi0",
        model_types=("pi0",),
        described_by=is_pi0,
        config=pi0_config,
        rules=pi0_rules,
        spellings=SPELLINGS,
        tied=repeated,
        filled=unread,
        in_one_file=True,
        kept={SCALES: OWN_NORMALIZER},
        beside=BESIDE,
        notice="grown from PaliGemma, whose Gemma terms restrict some uses",
        license="gemma",
    )
)
