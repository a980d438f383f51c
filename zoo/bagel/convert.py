"""Checkpoints of BAGEL: two towers that a suffix tells apart, a SigLIP tower, and a map of latents in and out.

The weights lie in ``ema.safetensors`` beside a config of each part. ``config.json`` says nothing that is needed, and
one published copy of it is no valid JSON, so it is not read. The picture autoencoder in ``ae.safetensors`` is no part
of the model: see :mod:`omnimoe.zoo.bagel.autoencoder`.
"""

from __future__ import annotations

from collections.abc import Iterator

from omnimoe import Attention, FeedForward, Norm, OmniMoeConfig, Tokens
from omnimoe.connectors import MLP
from omnimoe.convert import Converter, Rule, bank, register_converter, rename
from omnimoe.convert.converter import JsonFiles
from omnimoe.convert.decoders import activation, read_config, refuse, rope_of
from omnimoe.convert.tables import ATTENTION, siglip_rules
from omnimoe.encoders.siglip import Siglip
from omnimoe.modalities import Connected, GridPatches

LLM, VIT = "llm_config.json", "vit_config.json"
TOWERS = (0, 0, 1)
"""Text and what the vision encoder saw share a tower, latents have their own."""
SUFFIXES = ("", "_moe_gen")
BOS, EOS, BEGIN, END = 151_644, 151_645, 151_652, 151_653
"""``<|im_start|>``, ``<|im_end|>``, ``<|vision_start|>`` and ``<|vision_end|>`` of Qwen2.5's tokenizer."""
SEEN, DRAWN = 151_655, 151_654
"""Ids that stand at the positions of a picture that is seen and one that is drawn: ``<|image_pad|>``,
``<|vision_pad|>``. The checkpoint has no such tokens; any would do."""
LATENT_CHANNELS, LATENT_PATCH, LATENT_SIDE = 16, 2, 64
VISION_TOWER = "vision tower"
"""The part that a copy that only draws lacks, its connector included."""
PUBLISHED_VIT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 980,
    "patch_size": 14,
}
"""The vision encoder of the published model."""
CUT_LAYERS = 1
"""Layers at the end of the vision encoder that the checkpoint leaves out."""


def bagel_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for the published ones of the language model and of the vision encoder."""
    language = read_config({"model_type": "qwen2", **files[LLM]})
    refuse(language, use_sliding_window=False)
    vision = files[VIT]
    norm = Norm.Config(eps=language.rms_norm_eps, towers=TOWERS)
    seen = Siglip.Config(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"] - CUT_LAYERS,
        num_heads=vision["num_attention_heads"],
        patch_size=vision["patch_size"],
        max_side=vision["image_size"] // vision["patch_size"],
        eps=vision.get("layer_norm_eps", 1e-6),
        activation=vision.get("hidden_act", "gelu_pytorch_tanh"),
    )
    return OmniMoeConfig(
        hidden_size=language.hidden_size,
        num_layers=language.num_hidden_layers,
        modalities=(
            Tokens.Config(name="text", vocab_size=language.vocab_size),
            Connected.Config(
                name="vision",
                channels=seen.hidden_size,
                connector=MLP.Config(norm=False, activation="gelu_tanh"),
                encoder=seen,
                trains_encoder=True,
                max_side=seen.max_side,
                begin_id=BEGIN,
                end_id=END,
                placeholder_id=SEEN,
            ),
            GridPatches.Config(
                name="image",
                channels=LATENT_CHANNELS * LATENT_PATCH**2,
                max_side=LATENT_SIDE,
                begin_id=BEGIN,
                end_id=END,
                placeholder_id=DRAWN,
            ),
        ),
        attention=Attention.Config(
            num_heads=language.num_attention_heads,
            num_kv_heads=language.num_key_value_heads,
            bias=True,
            qk_norm="rms",
            qk_norm_eps=language.rms_norm_eps,
            rope=rope_of(language),
            towers=TOWERS,
        ),
        experts=FeedForward.Config(
            intermediate_size=language.intermediate_size, activation=activation(language.hidden_act), towers=TOWERS
        ),
        norm=norm,
        final_norm=norm,
        mask="block_causal",
        bidirectional_modalities=("vision", "image"),
        block_markers=True,
        private_noise=True,
        positions="blocks",
        initializer_range=language.initializer_range,
        max_position_embeddings=language.max_position_embeddings,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=language.pad_token_id,
    )


def bagel_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    theirs = "language_model.model"
    yield rename("model.embed_tokens.weight", f"{theirs}.embed_tokens.weight")
    yield bank("model.norm.weight", *(f"{theirs}.norm{suffix}.weight" for suffix in SUFFIXES))
    yield rename("lm_head.weight", "language_model.lm_head.weight")
    for index in range(config.num_layers):
        yield from _layer_rules(f"{theirs}.layers.{index}", f"model.backbone.layers.{index}")
    vision, image = (f"model.modalities.{name}" for name in ("vision", "image"))
    yield from siglip_rules(config.modalities[1].encoder, "vit_model.vision_model", f"{vision}.encoder")
    for ours, published in (("up_proj", "fc1"), ("down_proj", "fc2")):
        for kind in ("weight", "bias"):
            yield rename(f"{vision}.connector.{ours}.{kind}", f"connector.{published}.{kind}")
    yield rename(f"{vision}.place.weight", "vit_pos_embed.pos_embed")
    for ours, published in (("in", "vae2llm"), ("out", "llm2vae")):
        yield rename(f"{image}.{ours}_proj", f"{published}.weight")
        yield rename(f"{image}.{ours}_bias", f"{published}.bias")
    for ours, published in (("time_in", "mlp.0"), ("time_out", "mlp.2")):
        for kind in ("weight", "bias"):
            yield rename(f"{image}.{ours}.{kind}", f"time_embedder.{published}.{kind}")
    yield rename(f"{image}.place.weight", "latent_pos_embed.pos_embed")


def _layer_rules(theirs: str, ours: str) -> Iterator[Rule]:
    def both(name: str, kind: str = "weight") -> tuple[str, ...]:
        return tuple(f"{theirs}.{name}{suffix}.{kind}" for suffix in SUFFIXES)

    yield bank(f"{ours}.attention_norm.weight", *both("input_layernorm"))
    yield bank(f"{ours}.mlp_norm.weight", *both("post_attention_layernorm"))
    for site in ATTENTION:
        yield bank(f"{ours}.self_attn.{site}.weight", *both(f"self_attn.{site}"))
        if site != "o_proj":
            yield bank(f"{ours}.self_attn.{site}.bias", *both(f"self_attn.{site}", "bias"))
    for site in ("q_norm", "k_norm"):
        yield bank(f"{ours}.self_attn.{site}.weight", *both(f"self_attn.{site}"))
    networks = [f"{theirs}.mlp{suffix}" for suffix in SUFFIXES]
    gates = ((f"{network}.gate_proj.weight", f"{network}.up_proj.weight") for network in networks)
    yield bank(f"{ours}.mlp.experts.gate_up_proj", *gates)
    yield bank(f"{ours}.mlp.experts.down_proj", *(f"{network}.down_proj.weight" for network in networks))


BAGEL = register_converter(
    Converter(
        name="bagel",
        json_files=(LLM, VIT),
        weight_files={"": "ema.safetensors"},
        in_one_file=True,
        config=bagel_config,
        rules=bagel_rules,
        beside=("ae.safetensors",),
        optional={
            VISION_TOWER: r"(vit_model|connector)\..*",
            "table of places for seen pictures": r"vit_pos_embed\..*",
        },
        stand_ins={VIT: PUBLISHED_VIT},
    )
)
