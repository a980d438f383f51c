"""Checkpoints of VLMo: a stack whose networks a name tells apart, and the heads that pre-training or a task put on it.

The published files are pickles without a config; what is read here is their tensors as ``model.safetensors`` beside a
``config.json`` with the numbers of :func:`omnimoe.zoo.vlmo.published`. Which heads there are is asked of the names.
"""

from __future__ import annotations

from collections.abc import Iterator

from omnimoe import Attention, CheckpointError, Connected, FeedForward, LayerRange, Norm, OmniMoeConfig, Tokens
from omnimoe.connectors import AsIs
from omnimoe.convert import Chain, Permute, Reshape, Rule, bank, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.heads import HeadedConverter, listed_heads
from omnimoe.convert.rules import Rows
from omnimoe.encoders.patch_stem import PatchStem
from omnimoe.layers import SpanTables

HEADS = {"words": "mlm_score.decoder.weight", "pairs": "itm_score.fc.weight", "aligned": "itc_text_proj.fc.weight"}
"""Heads that are converted, each with the name of a weight that tells it."""
KEYS = ("text", "vision", "joint_text", "joint_vision")
"""What picks the copy of a row: its modality, and whether its sequence has the other one too."""
BELOW, ABOVE = (0, 1, 0, 1), (0, 1, 2, 2)
"""Copies of the keys in layers without and with a joint network."""
COPIES = ("text", "imag", "vl")
"""Published names of the copies."""
HOLDER = 1
"""The id that stands for pictures: ``[unused0]`` of BERT's words."""
_WANTED = {"use_abs_pos_emb": False, "need_relative_position_embed": True, "qkv_bias": True}
_BERT_EPS = 1e-12


def vlmo_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for the published numbers."""
    plain = files[CONFIG]
    for name, value in _WANTED.items():
        if plain.get(name, value) != value:
            raise CheckpointError(f"{name} is {plain[name]!r}, and only {value!r} is converted")
    kinds = listed_heads(plain, HEADS)
    width, layers, joint_from = plain["embed_dim"], plain["depth"], plain["vlffn_start_layer_index"]
    if not 0 < joint_from <= layers:
        raise CheckpointError(f"vlffn_start_layer_index {joint_from} must lie in 1 to depth, which is {layers}")
    stem = PatchStem.Config(
        hidden_size=width, image_size=plain["image_size"], patch_size=plain["patch_size"], has_mask=False
    )
    norm = Norm.Config(form="layer", eps=1e-6)
    network = FeedForward.Config(
        intermediate_size=int(width * plain.get("mlp_ratio", 4)),
        activation="gelu",
        gated=False,
        bias=True,
        towers=BELOW,
    )
    above = LayerRange(
        start=min(joint_from, layers - 1), experts=network.replace(towers=ABOVE), mlp_norm=norm.replace(towers=ABOVE)
    )
    return OmniMoeConfig(
        hidden_size=width,
        num_layers=layers,
        modalities=(
            Tokens.Config(name="text", vocab_size=plain["vocab_size"]),
            Connected.Config(
                name="vision",
                channels=width,
                connector=AsIs.Config(),
                encoder=stem,
                trains_encoder=True,
                num_tokens=stem.num_rows,
                placeholder_id=HOLDER,
            ),
        ),
        keys=KEYS,
        key_rule="joint",
        attention=Attention.Config(
            num_heads=plain["num_heads"], bias=True, key_bias=False, output_bias=True, rope=None
        ),
        experts=network,
        norm=norm,
        mlp_norm=norm.replace(towers=BELOW),
        final_norm=norm,
        layers=(above,) if joint_from < layers else (),
        layer_scale=0.1,
        mask="bidirectional",
        positions="spans",
        position_bias=SpanTables.Config(
            reaches=(plain["max_text_len_of_initckpt"] - 1, 0),
            sides=(0, stem.image_size // stem.patch_size),
            counts_to_key=True,
            crosses=True,
        ),
        modality_rows=True,
        embedding_norm_eps=_BERT_EPS,
        head_norm_eps=_BERT_EPS if "words" in kinds else 0.0,
        head_bias="words" in kinds,
        tie_word_embeddings="words" not in kinds,
        pooled_labels=2 if "pairs" in kinds else 0,
        aligned_size=width if "aligned" in kinds else 0,
        max_position_embeddings=plain["max_text_len"] + stem.num_rows,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        use_cache=False,
    )


def vlmo_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield from _entrance(config)
    yield from _biases(config)
    width = config.hidden_size
    for kind in ("weight", "bias"):
        yield bank(f"model.norm.{kind}", f"transformer.norm.{kind}")
    for index, block in enumerate(config.blocks):
        ours, theirs = f"model.backbone.layers.{index}", f"transformer.blocks.{index}"
        for place, site in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = Rows(f"{theirs}.attn.qkv.weight", place * width, (place + 1) * width)
            yield bank(f"{ours}.self_attn.{site}.weight", rows)
        yield bank(f"{ours}.self_attn.q_proj.bias", f"{theirs}.attn.q_bias")
        yield bank(f"{ours}.self_attn.v_proj.bias", f"{theirs}.attn.v_bias")
        yield rename(f"{ours}.attention_scale.weight", f"{theirs}.gamma_1")
        yield rename(f"{ours}.mlp_scale.weight", f"{theirs}.gamma_2")
        copies = COPIES[: 1 + max(block.experts.towers)]
        for kind in ("weight", "bias"):
            yield bank(f"{ours}.self_attn.o_proj.{kind}", f"{theirs}.attn.proj.{kind}")
            yield bank(f"{ours}.attention_norm.{kind}", f"{theirs}.norm1.{kind}")
            yield bank(f"{ours}.mlp_norm.{kind}", *(f"{theirs}.norm2_{copy}.{kind}" for copy in copies))
        for mine, published in (("gate_up", "fc1"), ("down", "fc2")):
            into = tuple(f"{theirs}.mlp_{copy}.{published}" for copy in copies)
            yield bank(f"{ours}.mlp.experts.{mine}_proj", *(f"{name}.weight" for name in into))
            yield bank(f"{ours}.mlp.experts.{mine}_bias", *(f"{name}.bias" for name in into))
    yield from _heads(config)


def _entrance(config: OmniMoeConfig) -> Iterator[Rule]:
    stem, vision, width = config.modalities[1].encoder, "model.modalities.vision.encoder", config.hidden_size
    yield rename("model.embed_tokens.weight", "text_embeddings.word_embeddings.weight")
    yield rename("model.embed_tokens.types", "text_embeddings.token_type_embeddings.weight")
    for kind in ("weight", "bias"):
        yield rename(f"model.embed_tokens.norm.{kind}", f"text_embeddings.LayerNorm.{kind}")
    yield rename("model.kinds.weight", "token_type_embeddings.weight")
    yield rename(f"{vision}.cls_token", "transformer.cls_token", change=Reshape((1, 1, width), (width,)))
    side, channels = stem.patch_size, stem.in_channels
    kernel = Chain((Permute((0, 2, 3, 1)), Reshape((width, side, side, channels), (width, channels * side**2))))
    yield rename(f"{vision}.proj.weight", "transformer.patch_embed.proj.weight", change=kernel)
    yield rename(f"{vision}.proj.bias", "transformer.patch_embed.proj.bias")


def _biases(config: OmniMoeConfig) -> Iterator[Rule]:
    """One published table for all: cells of a picture, text to picture, picture to text, words of a text."""
    bias = config.position_bias
    cells, words = bias.rows_of(1), bias.rows_of(0)
    table, ours = "relative_position_bias_table", "model.position_bias"
    yield rename(f"{ours}.tables.1.weight", Rows(table, 0, cells))
    yield rename(f"{ours}.cross.weight", Rows(table, cells, cells + 2))
    yield rename(f"{ours}.tables.0.weight", Rows(table, cells + 2, cells + 2 + words))


def _heads(config: OmniMoeConfig) -> Iterator[Rule]:
    if config.head_bias:
        yield rename("lm_head.weight", "mlm_score.decoder.weight")
        yield rename("lm_head.bias", "mlm_score.bias")
        for mine, published in (("dense", "dense"), ("norm", "LayerNorm")):
            for kind in ("weight", "bias"):
                yield rename(f"head_layer.{mine}.{kind}", f"mlm_score.transform.{published}.{kind}")
    if config.pooled_labels:
        for mine, published in (("dense", "pooler.dense"), ("score", "itm_score.fc")):
            for kind in ("weight", "bias"):
                yield rename(f"pooled.{mine}.{kind}", f"{published}.{kind}")
    if config.aligned_size:
        yield bank("aligned.weight", "itc_text_proj.fc.weight", "itc_image_proj.fc.weight")
        yield rename("aligned.logit_scale", "logit_scale")


KEPT = "vlmo_rest.safetensors"
"""What has no place here and goes along."""
VLMO = register_converter(
    HeadedConverter(
        name="vlmo",
        model_types=("vlmo",),
        config=vlmo_config,
        rules=vlmo_rules,
        heads=HEADS,
        kept={
            r"(text_|text_imag_)?relative_position_index": KEPT,
            r"text_embeddings\.position_(ids|embeddings\.weight)": KEPT,
            r"itc_vl_(text|image)_proj\.fc\.weight|logit_vl_scale": KEPT,
            r"(pooler\.dense|vqa_classifier\.\d|nlvr2_classifier\.\d)\.(weight|bias)": KEPT,
        },
    )
)
