"""Checkpoints of ONE-PEACE: adapters and networks that a name tells apart, on one stack.

The published files are pickles of fairseq; what is read here is the tensors under ``"model"`` as ``model.safetensors``
beside a ``config.json`` as :func:`omnimoe.zoo.one_peace.published` writes it. The learned row that begins a text is no
word of theirs: it is the last row of our table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnimoe import CheckpointError, Connected, Norm, OmniMoeConfig, Tokens
from omnimoe.connectors import AsIs
from omnimoe.convert import Change, Reshape, Rule, bank, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.heads import HeadedConverter, listed_heads
from omnimoe.convert.rules import Part
from omnimoe.encoders.nested_stem import NestedStem
from omnimoe.encoders.wave_stem import WaveStem
from omnimoe.experts import SubNormFeedForward
from omnimoe.layers import SpanTables, SubNormAttention

BRANCHES = ("text", "image", "audio")
"""Published names of the modalities."""
HEADS = {"aligned": "text_proj.weight"}
"""Heads that are converted, each with the name of a weight that tells it."""
HOLDERS = {"image": 3, "audio": 2}
"""How far from the end of the published words the id stands that holds the place of a picture or a sound: fillers."""
NAMES = {"text": "text", "image": "vision", "audio": "audio"}
LENGTHS = (514, 1024)
"""Learned positions of a text, and the longest text or sound whose distances have scores."""
_ENCODER: dict[str, Any] = {
    "magneto_scale_attn": True,
    "scale_attn": False,
    "scale_fc": True,
    "scale_heads": False,
    "use_layer_scale": True,
    "activation_fn": "gelu",
    "use_text_moe": True,
}
_ADAPTER: dict[str, Any] = {"layernorm_embedding": False, "add_type_embedding": False, "use_attn_bias": True}
_OF_KIND: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"vision_encoder_type": "hmlp"},
    "audio": {"abs_pos_type": "conv", "conv_pos_pre_ln": False, "conv_bias": False},
}
_DEFAULTS: dict[str, Any] = {
    "scale_attn": True,
    "scale_heads": True,
    "magneto_scale_attn": False,
    "use_attn_bias": False,
}
"""What the authors' code takes where a setting is left out, where that is not what is converted."""


@dataclass(frozen=True)
class WithWhole(Change):
    """A table as it is, and the row for the whole of a span, which is published as ``(1, 1, D)``, as one row of it."""

    def into(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1])

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if len(tensor) == 1 else tensor


def one_peace_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for the published settings."""
    plain = files[CONFIG]
    encoder, kinds = plain["encoder"], listed_heads(plain, HEADS)
    _refuse("encoder", encoder, _ENCODER)
    branches = [kind for kind in BRANCHES if encoder.get(f"use_{kind}_moe", True)]
    adapters = {kind: encoder.get(f"{kind}_adapter", {}) for kind in branches}
    for kind, adapter in adapters.items():
        _refuse(f"{kind}_adapter", adapter, _ADAPTER | _OF_KIND[kind])
    width, words = encoder["embed_dim"], plain["vocab_size"]
    modalities: list[Any] = [Tokens.Config(name="text", vocab_size=words + 1)]
    places, reaches, sides = [LENGTHS[0]], [adapters["text"].get("bucket_size", 256)], [0]
    for kind in branches[1:]:
        stem = _picture_stem(plain, adapters[kind], width) if kind == "image" else _sound_stem(adapters[kind], width)
        rows = stem.num_rows if isinstance(stem, NestedStem.Config) else 0
        modalities.append(
            Connected.Config(
                name=NAMES[kind],
                channels=width,
                connector=AsIs.Config(),
                encoder=stem,
                trains_encoder=True,
                num_tokens=rows or None,
                placeholder_id=words - HOLDERS[kind],
            )
        )
        places.append(rows)
        sides.append(stem.image_size // 16 if isinstance(stem, NestedStem.Config) else 0)
        reaches.append(0 if rows else adapters[kind].get("bucket_size", 256))
    norm = Norm.Config(form="layer")
    return OmniMoeConfig(
        hidden_size=width,
        num_layers=encoder["layers"],
        modalities=tuple(modalities),
        attention=SubNormAttention.Config(
            num_heads=encoder["attention_heads"], bias=True, key_bias=False, output_bias=True, rope=None
        ),
        experts=SubNormFeedForward.Config(
            intermediate_size=encoder["ffn_embed_dim"], gated=True, input_bias=False, towers="modality"
        ),
        norm=norm,
        final_norm=norm.replace(towers="modality"),
        layer_scale=encoder.get("layer_scale_init_value", 1e-2),
        mask="bidirectional",
        positions="spans",
        learned_positions=tuple(places),
        position_bias=SpanTables.Config(
            reaches=tuple(reaches),
            longest=tuple(LENGTHS[1] if reach else 0 for reach in reaches),
            sides=tuple(sides),
            by_layer=False,
        ),
        tie_word_embeddings=True,
        aligned_size=width if "aligned" in kinds else 0,
        aligned_bias="aligned" in kinds,
        max_position_embeddings=encoder.get("max_positions", LENGTHS[1]),
        bos_token_id=words,
        pad_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )


def _refuse(where: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        found = given.get(name, _DEFAULTS.get(name, value))
        if found != value:
            raise CheckpointError(f"{name} of {where} is {found!r}, and only {value!r} is converted")


def _picture_stem(plain: Mapping[str, Any], adapter: Mapping[str, Any], width: int) -> NestedStem.Config:
    stem = NestedStem.Config(hidden_size=width, image_size=plain["patch_image_size"])
    for name in ("bucket_size", "rel_bucket_size"):
        if adapter.get(name, 16) ** 2 != stem.num_rows - 1:
            raise CheckpointError(
                f"{name} of image_adapter is {adapter.get(name, 16)}, and pictures of {stem.image_size} pixels have "
                f"{stem.num_rows - 1} patches; write {stem.image_size // 16}, with tables brought to it"
            )
    return stem


def _sound_stem(adapter: Mapping[str, Any], width: int) -> WaveStem.Config:
    spec = re.findall(r"\((\d+),\s*(\d+),\s*(\d+)\)\](?:\s*\*\s*(\d+))?", adapter["feature_encoder_spec"])
    convolutions = [tuple(map(int, found[:3])) for found in spec for _ in range(int(found[3] or 1))]
    if not convolutions or len({channels for channels, _, _ in convolutions}) != 1:
        raise CheckpointError(
            f"feature_encoder_spec {adapter['feature_encoder_spec']!r} must be lists of (channels, kernel, stride) "
            "with one number of channels"
        )
    layers = adapter.get("conv_pos_depth", 5)
    return WaveStem.Config(
        hidden_size=width,
        inner_size=convolutions[0][0],
        kernels=tuple(kernel for _, kernel, _ in convolutions),
        strides=tuple(stride for _, _, stride in convolutions),
        position_layers=layers,
        position_kernel=max(3, adapter.get("conv_pos_width", 95) // layers),
        position_groups=adapter.get("conv_pos_groups", 16),
    )


def one_peace_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    outer, stack = "encoder_wrapper", "encoder_wrapper.fusion_model"
    branches = tuple(kind for kind in BRANCHES if NAMES[kind] in config.modality_names)
    words = config.modalities[0].vocab_size - 1
    text = f"{outer}.text_adapter"
    yield rename(
        "model.embed_tokens.weight",
        Part(f"{text}.embed_tokens.weight", words),
        Part(f"{text}.cls_embedding", 1),
        change=WithWhole(),
    )
    tables = {"text": f"{text}.embed_positions.weight", "image": f"{outer}.image_adapter.pos_embed"}
    sizes = dict(zip(branches, config.learned_positions, strict=True))
    yield rename("model.places.weight", *(Part(name, sizes[kind]) for kind, name in tables.items() if kind in branches))
    for place, kind in enumerate(branches):
        name = f"{outer}.{kind}_adapter.rel_pos_table_list.0.weight"
        yield rename(f"model.position_bias.tables.{place}.weight", name)
    for place, kind in enumerate(branches[1:], start=1):
        stem, ours = config.modalities[place].encoder, f"model.modalities.{NAMES[kind]}.encoder"
        entrance = _picture_rules if kind == "image" else _sound_rules
        yield from entrance(stem, f"{outer}.{kind}_adapter", ours)
    for kind in ("weight", "bias"):
        yield bank(f"model.norm.{kind}", *(f"{stack}.{branch}_layer_norm.{kind}" for branch in branches))
    for index in range(config.num_layers):
        yield from _layer_rules(f"{stack}.layers.{index}", f"model.backbone.layers.{index}", branches)
    if config.aligned_size:
        for kind in ("weight", "bias"):
            yield bank(f"aligned.{kind}", *(f"{branch}_proj.{kind}" for branch in branches))
        yield rename("aligned.logit_scale", "logit_scale")


def _layer_rules(theirs: str, ours: str, branches: tuple[str, ...]) -> Iterator[Rule]:
    for mine, published in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "out_proj")):
        yield bank(f"{ours}.self_attn.{mine}.weight", f"{theirs}.self_attn.{published}.weight")
        if mine != "k_proj":
            yield bank(f"{ours}.self_attn.{mine}.bias", f"{theirs}.self_attn.{published}.bias")
    norms = {"self_attn.o_proj.norm": "self_attn.ln", "attention_norm": "self_attn_layer_norm"}
    for kind in ("weight", "bias"):
        for mine, published in (norms | {"mlp_norm": "final_layer_norm"}).items():
            yield bank(f"{ours}.{mine}.{kind}", f"{theirs}.{published}.{kind}")
        yield bank(f"{ours}.mlp.down_proj.norm.{kind}", *(f"{theirs}.{branch}_ffn.2.{kind}" for branch in branches))
        yield bank(f"{ours}.mlp.down_proj.{kind}", *(f"{theirs}.{branch}_ffn.3.{kind}" for branch in branches))
    into = (tuple(f"{theirs}.{branch}_ffn.0.wi_{half}.weight" for half in (0, 1)) for branch in branches)
    yield bank(f"{ours}.mlp.gate_up_proj.weight", *into)
    yield rename(f"{ours}.attention_scale.weight", f"{theirs}.gamma_1")
    yield rename(f"{ours}.mlp_scale.weight", f"{theirs}.gamma_2")


def _picture_rules(stem: NestedStem.Config, theirs: str, ours: str) -> Iterator[Rule]:
    flat = Reshape((1, 1, stem.hidden_size), (stem.hidden_size,))
    yield rename(f"{ours}.cls_token", f"{theirs}.cls_embedding", change=flat)
    for kind in ("weight", "bias"):
        for place, at in enumerate((0, 3, 6)):
            yield rename(f"{ours}.maps.{place}.{kind}", f"{theirs}.embed_images.{at}.{kind}")
        for place, at in enumerate((1, 4)):
            yield rename(f"{ours}.norms.{place}.{kind}", f"{theirs}.embed_images.{at}.layer_norm.{kind}")


def _sound_rules(stem: WaveStem.Config, theirs: str, ours: str) -> Iterator[Rule]:
    flat = Reshape((1, 1, stem.hidden_size), (stem.hidden_size,))
    yield rename(f"{ours}.cls_token", f"{theirs}.cls_embedding", change=flat)
    yield rename(f"{ours}.cls_position", f"{theirs}.cls_pos_embed", change=flat)
    for place in range(len(stem.kernels)):
        at = f"{theirs}.embed_audios.0.conv_layers.{place}"
        yield rename(f"{ours}.convolutions.{place}.weight", f"{at}.0.weight")
        for kind in ("weight", "bias"):
            yield rename(f"{ours}.norms.{place}.{kind}", f"{at}.2.1.{kind}")
    for kind in ("weight", "bias"):
        yield rename(f"{ours}.norm.{kind}", f"{theirs}.embed_audios.2.{kind}")
        yield rename(f"{ours}.proj.{kind}", f"{theirs}.embed_audios.3.{kind}")
        for place in range(stem.position_layers):
            name = f"{theirs}.embed_positions.{1 + place}.0.{kind}"
            yield rename(f"{ours}.positions.{place}.{kind}", name)


KEPT = "one_peace_rest.safetensors"
"""What has no place here and goes along."""
ONE_PEACE = register_converter(
    HeadedConverter(
        name="one_peace",
        model_types=("one_peace",),
        config=one_peace_config,
        rules=one_peace_rules,
        heads=HEADS,
        kept={
            r"encoder_wrapper\.(text|image|audio)_adapter\.(rp_bucket|position_idx|mask_embedding)": KEPT,
            r"encoder_wrapper\.fusion_model\.version": KEPT,
            r"decoder_.*|(text|image|audio)_mask_(token|head\..*)": KEPT,
            r"(text|image|audio)_proj\..*|logit_scale|.*classify_head\..*": KEPT,
        },
    )
)
