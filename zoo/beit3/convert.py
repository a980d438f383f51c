"""Checkpoints of BEiT-3: an encoder of torchscale, and the heads that a task put on it.

Copy A of every weight is that of pictures, copy B that of text. The published files are pickles without a config; what
is read here is their tensors as ``model.safetensors`` beside a ``config.json`` with the arguments of torchscale's
``EncoderConfig``. Which heads there are is asked of the names of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omnimoe import CheckpointError, Connected, Norm, OmniMoeConfig, Tokens
from omnimoe.connectors import AsIs
from omnimoe.convert import Chain, Permute, Reshape, Rule, bank, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.heads import HeadedConverter, listed_heads
from omnimoe.convert.rules import Part
from omnimoe.encoders.patch_stem import PatchStem
from omnimoe.experts import SubNormFeedForward
from omnimoe.layers import SubNormAttention

HEADS = {"words": "mlm_head.weight", "aligned": "language_head.weight"}
"""Heads that are converted, each with the name of a weight that tells it."""
COPIES = ("B", "A")
"""Published copy of each of our modalities: text, pictures."""
OFFSET = 2
"""Row of a table of positions that position 0 meets, as in fairseq."""
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}
_SITES = (
    ("self_attn.q_proj", "self_attn.q_proj"),
    ("self_attn.k_proj", "self_attn.k_proj"),
    ("self_attn.v_proj", "self_attn.v_proj"),
    ("self_attn.o_proj", "self_attn.out_proj"),
    ("self_attn.o_proj.norm", "self_attn.inner_attn_ln"),
    ("attention_norm", "self_attn_layer_norm"),
    ("mlp_norm", "final_layer_norm"),
)
_NETWORK = (("gate_up_proj", "fc1"), ("down_proj", "fc2"), ("down_proj.norm", "ffn_layernorm"))
_WANTED: dict[str, Any] = {
    "multiway": True,
    "subln": True,
    "encoder_normalize_before": True,
    "normalize_output": True,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "deepnorm": False,
    "moe_freq": 0,
    "rel_pos_buckets": 0,
    "xpos_rel_pos": False,
    "share_encoder_input_output_embed": False,
}
"""Arguments of torchscale of which one value alone is BEiT-3."""


def is_beit3(plain: Mapping[str, Any]) -> bool:
    """Whether a config without a ``model_type`` holds the arguments of torchscale's multiway encoder."""
    return bool(plain.get("multiway")) and "encoder_embed_dim" in plain


def beit3_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for the arguments of torchscale's encoder; what is left out has torchscale's default."""
    plain = files[CONFIG]
    for name, value in _WANTED.items():
        if plain.get(name, value) != value:
            raise CheckpointError(f"{name} is {plain[name]!r}, and only {value!r} is converted")
    if not plain.get("no_output_layer", True):
        raise CheckpointError("no_output_layer is False, and only a head named mlm_head is converted")
    kinds = listed_heads(plain, HEADS)
    activation = plain.get("activation_fn", "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"activation_fn {activation!r} has no counterpart here; known: {', '.join(ACTIVATIONS)}")
    width, vocab_size = plain.get("encoder_embed_dim", 768), plain["vocab_size"]
    eps, longest = plain.get("layernorm_eps", 1e-5), plain.get("max_source_positions", 1024)
    stem = PatchStem.Config(
        hidden_size=width,
        image_size=plain.get("img_size", 224),
        patch_size=plain.get("patch_size", 16),
        in_channels=plain.get("in_chans", 3),
    )
    norm = Norm.Config(form="layer", eps=eps, towers="modality")
    return OmniMoeConfig(
        hidden_size=width,
        num_layers=plain.get("encoder_layers", 12),
        modalities=(
            Tokens.Config(name="text", vocab_size=vocab_size),
            Connected.Config(
                name="vision",
                channels=width,
                connector=AsIs.Config(),
                encoder=stem,
                trains_encoder=True,
                num_tokens=stem.num_rows,
                placeholder_id=vocab_size - 1,
            ),
        ),
        attention=SubNormAttention.Config(
            num_heads=plain.get("encoder_attention_heads", 12),
            bias=True,
            output_bias=True,
            rope=None,
            towers="modality",
            inner_norm_eps=eps,
        ),
        experts=SubNormFeedForward.Config(
            intermediate_size=plain.get("encoder_ffn_embed_dim", 3072),
            activation=ACTIVATIONS[activation],
            towers="modality",
            inner_norm_eps=eps,
        ),
        norm=norm,
        final_norm=norm,
        mask="bidirectional",
        positions="spans",
        learned_positions=(longest, stem.num_rows + OFFSET),
        position_offset=OFFSET,
        head_bias="words" in kinds,
        tie_word_embeddings="words" not in kinds,
        aligned_size=width if "aligned" in kinds else 0,
        max_position_embeddings=longest - OFFSET + stem.num_rows,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )


def _copies(ours: str, theirs: str) -> Iterator[Rule]:
    """Weight and bias of a site; ``{}`` in the published name stands for the copy."""
    for kind in ("weight", "bias"):
        yield bank(f"{ours}.{kind}", *(f"{theirs.format(copy)}.{kind}" for copy in COPIES))


def beit3_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    encoder, stem = "beit3.encoder", config.modalities[1].encoder
    vision, width, side = "model.modalities.vision.encoder", stem.hidden_size, stem.patch_size
    yield rename("model.embed_tokens.weight", "beit3.text_embed.weight")
    tables = zip(COPIES, config.learned_positions, strict=True)
    yield rename(
        "model.places.weight", *(Part(f"{encoder}.embed_positions.{copy}.weight", rows) for copy, rows in tables)
    )
    for name in ("cls_token", "mask_token"):
        yield rename(f"{vision}.{name}", f"beit3.vision_embed.{name}", change=Reshape((1, 1, width), (width,)))
    channels = stem.in_channels
    kernel = Chain((Permute((0, 2, 3, 1)), Reshape((width, side, side, channels), (width, channels * side**2))))
    yield rename(f"{vision}.proj.weight", "beit3.vision_embed.proj.weight", change=kernel)
    yield rename(f"{vision}.proj.bias", "beit3.vision_embed.proj.bias")
    yield from _copies("model.norm", f"{encoder}.layer_norm.{{}}")
    for index in range(config.num_layers):
        ours, theirs = f"model.backbone.layers.{index}", f"{encoder}.layers.{index}"
        for mine, published in _SITES:
            yield from _copies(f"{ours}.{mine}", f"{theirs}.{published}.{{}}")
        for mine, published in _NETWORK:
            yield from _copies(f"{ours}.mlp.{mine}", f"{theirs}.ffn.{{}}.{published}")
    if config.head_bias:
        for kind in ("weight", "bias"):
            yield rename(f"lm_head.{kind}", f"mlm_head.{kind}")
    if config.aligned_size:
        yield bank("aligned.weight", "language_head.weight", "vision_head.weight")
        yield rename("aligned.logit_scale", "logit_scale")


BEIT3 = register_converter(
    HeadedConverter(
        name="beit3",
        model_types=("beit3",),
        described_by=is_beit3,
        config=beit3_config,
        rules=beit3_rules,
        heads=HEADS,
        ignored={
            r"(head|pooler|fc_norm)\..*": "a classifier over the labels of one task, which is trained anew",
            r"mim_head\..*": "a head over the codes of a picture tokenizer that the model does not have",
        },
    )
)
