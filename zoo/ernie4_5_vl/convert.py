"""Checkpoints of ERNIE-4.5-VL: two pools of experts of unequal width, for words and for what is seen, in one list.

A file holds the experts of a layer one after the other, those for words first, and both routers beside each other. Its
rotary positions turn neighbouring numbers of a head, ours its halves, so rows of queries and keys change places.

There are two forms of ``config.json``: the one of transformers, nested, and the one that the weights were first
published with, flat, whose tensors of the vision tower lack the prefix ``model.``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from omnimoe import Attention, FeedForward, LayerRange, OmniMoeConfig, RoutedExperts, Tokens
from omnimoe.checkpoint import CheckpointError
from omnimoe.connectors import AsIs
from omnimoe.convert import Converter, Reshape, Rows, Rule, Transpose, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, decoder_config, read_config, refuse, top_k_router
from omnimoe.convert.tables import layers, network_rules, norm_rules, outer_rules, tied_head
from omnimoe.encoders.rotary_vit import FRAMES, RotaryViT
from omnimoe.layers import Rope
from omnimoe.modalities import Connected
from omnimoe.routers import ByModalityRouter
from omnimoe.zoo.ernie4_5.convert import turned_rules

NESTED, FLAT = "ernie4_5_vl_moe", "ernie4_5_moe_vl"
"""The ``model_type`` of either form."""
BOS, EOS, PAD = 1, 2, 0
SECTIONS = [22, 22, 20]
"""Frequencies of a head for row, column and time."""
MERGES = (("fc1", "0"), ("fc2", "2"), ("norm", "3"))


def ernie4_5_vl_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one of either form."""
    plain = files[CONFIG]
    config = read_config(nested(plain) if plain.get("model_type") == FLAT else plain)
    text, vision = config.text_config, config.vision_config
    refuse(text, use_bias=False)
    refuse(vision, in_channels=3, temporal_merge_size=FRAMES)
    network: dict[str, Any] = {"activation": activation(text.hidden_act)}
    experts, widths = text.moe_num_experts, tuple(text.moe_intermediate_size)
    if len(widths) != 2 or text.moe_k < 2:
        raise CheckpointError(
            f"moe_intermediate_size {list(widths)} and moe_k {text.moe_k}: two pools of experts are converted, of "
            "which a token takes two or more"
        )
    router = top_k_router(
        text,
        normalize_min=text.moe_norm_min,
        expert_bias="shared",
        keep_float32=True,
    )
    dense = FeedForward.Config(intermediate_size=text.intermediate_size, **network)
    made = decoder_config(
        text,
        attention=Attention.Config(
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None),
            rope=_rope(text),
        ),
        experts=RoutedExperts.Config(
            num_experts=2 * experts,
            intermediate_size=widths[0],
            pools=tuple((experts, width) for width in widths),
            num_shared_experts=text.moe_num_shared_experts or 0,
            router=ByModalityRouter.Config(experts=(experts, experts), router=router),
            **network,
        ),
        layers=tuple(
            LayerRange(start=layer, stop=layer + 1, experts=dense)
            for layer, kind in enumerate(text.mlp_layer_types)
            if kind == "dense"
        ),
        markers="key",
        positions="grids",
    )
    seen = Connected.Config(
        name="vision",
        channels=text.hidden_size,
        connector=AsIs.Config(),
        encoder=_tower(text, vision),
        trains_encoder=True,
        begin_id=config.image_start_token_id,
        end_id=config.image_end_token_id,
        placeholder_id=config.image_token_id,
        more_ids=((config.video_start_token_id, config.video_end_token_id, config.video_token_id),),
    )
    ids = {name: getattr(made, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    usual = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return made.replace(
        modalities=(Tokens.Config(name="text", vocab_size=text.vocab_size), seen),
        tie_word_embeddings=config.tie_word_embeddings and text.tie_word_embeddings,
        **{name: usual[name] if token is None else token for name, token in ids.items()},
    )


def nested(plain: dict[str, Any]) -> dict[str, Any]:
    """A flat config in the form of transformers."""

    def first(name: str, default: Any) -> Any:
        value = plain.get(name, default)
        return value[0] if isinstance(value, list) else value

    def listed(name: str, default: int) -> list[int]:
        value = plain.get(name, default)
        return value if isinstance(value, list) else [value]

    count, interval = plain["num_hidden_layers"], plain.get("moe_layer_interval", 1)
    start, stop = min(listed("moe_layer_start_index", 1)), max(listed("moe_layer_end_index", count))
    stop = count if stop < 0 else stop
    sparse = [(layer + 1) % interval == 0 and start <= layer <= stop for layer in range(count)]
    time = plain.get("freq_allocation", SECTIONS[2])
    half = plain["hidden_size"] // plain["num_attention_heads"] // 2
    kept = (
        *("hidden_size", "intermediate_size", "max_position_embeddings", "moe_intermediate_size", "moe_k"),
        *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size", "use_bias"),
        *("hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "moe_norm_min"),
        *("tie_word_embeddings", "router_aux_loss_coef"),
    )
    seen = plain["vision_config"]
    width = seen.get("embed_dim", seen["hidden_size"])
    text = {
        **{name: plain[name] for name in kept if name in plain},
        "moe_num_experts": first("moe_num_experts", 64),
        "moe_num_shared_experts": plain.get("moe_num_shared_experts") or 0,
        "mlp_layer_types": ["sparse" if is_sparse else "dense" for is_sparse in sparse],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(plain.get("rope_theta", 500_000.0)),
            "mrope_section": [(half - time) // 2, (half - time) // 2, time],
        },
    }
    return {
        "model_type": NESTED,
        "text_config": text,
        "vision_config": {
            **{name: seen[name] for name in ("depth", "num_heads", "patch_size", "hidden_act") if name in seen},
            "hidden_size": width,
            "intermediate_size": int(width * seen.get("mlp_ratio", 4)),
            "spatial_merge_size": plain.get("spatial_conv_size", 2),
            "temporal_merge_size": plain.get("temporal_conv_size", FRAMES),
        },
        "image_token_id": plain.get("im_patch_id", 100_295),
        "tie_word_embeddings": plain.get("tie_word_embeddings", True),
    }


def _rope(text: PreTrainedConfig) -> Rope.Config:
    given = text.rope_parameters
    tall, wide, time = given.get("mrope_section", SECTIONS)
    if given.get("rope_type", "default") != "default" or tall != wide:
        raise CheckpointError(
            f"rope_parameters {dict(given)}: unscaled positions with as many frequencies for rows as for columns are "
            "converted"
        )
    return Rope.Config(theta=float(given["rope_theta"]), axes=(1, 2) * tall + (0,) * time)


def _tower(text: PreTrainedConfig, vision: PreTrainedConfig) -> RotaryViT.Config:
    return RotaryViT.Config(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.depth,
        num_heads=vision.num_heads,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        out_size=text.hidden_size,
        theta=float(vision.rope_parameters["rope_theta"]),
        eps=vision.rms_norm_eps,
        out_eps=text.rms_norm_eps,
        activation=vision.hidden_act,
    )


def ernie4_5_vl_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield from outer_rules(config)
    for theirs, ours, block in layers(config):
        yield from norm_rules(theirs, ours)
        yield from turned_rules(theirs, ours, config)
        if isinstance(block.experts, RoutedExperts.Config):
            yield from _mixture_rules(f"{theirs}.mlp", f"{ours}.mlp", block.experts)
        else:
            yield from network_rules(f"{theirs}.mlp", f"{ours}.mlp.experts")
    flat = config.published["files"][CONFIG].get("model_type") == FLAT
    yield from _vision_rules("vision_model" if flat else "model.vision_model", config)


def _mixture_rules(theirs: str, ours: str, experts: RoutedExperts.Config) -> Iterator[Rule]:
    first = 0
    for pool, (count, _) in enumerate(experts.pools):
        router = f"{ours}.router.routers.{pool}"
        weight = f"{theirs}.gate.weight" + (f"_{pool}" if pool else "")
        yield rename(f"{router}.scorer.weight", weight, change=Transpose())
        bias = Rows(f"{theirs}.moe_statics.e_score_correction_bias", pool, pool + 1)
        yield rename(f"{router}.expert_bias", bias, change=Reshape((1, count), (count,)))
        named = tuple(f"{theirs}.experts.{expert}" for expert in range(first, first + count))
        yield from network_rules(named, f"{ours}.experts.pools.{pool}")
        first += count
    if experts.num_shared_experts:
        yield from network_rules(f"{theirs}.shared_experts", f"{ours}.shared_experts")


def _vision_rules(theirs: str, config: OmniMoeConfig) -> Iterator[Rule]:
    ours, resampler = "model.modalities.vision.encoder", "model.resampler_model"
    pairs = [("norm", f"{theirs}.ln"), ("out_proj", f"{resampler}.mlp")]
    for index in range(config.modalities[1].encoder.num_layers):
        block = f"{theirs}.blocks.{index}"
        pairs += [(f"layers.{index}.{part}", f"{block}.{part}") for part in ("norm1", "norm2")]
        pairs += [(f"layers.{index}.{part}", f"{block}.attn.{part}") for part in ("qkv", "proj")]
        pairs += [(f"layers.{index}.{part}", f"{block}.mlp.{part}") for part in ("fc1", "fc2")]
    for merge, published in (("merge", "spatial_linear"), ("merge_frames", "temporal_linear")):
        pairs += [(f"{merge}.{mine}", f"{resampler}.{published}.{other}") for mine, other in MERGES]
    yield rename(f"{ours}.patch_embedding.weight", f"{theirs}.patch_embed.proj.weight")
    yield rename(f"{ours}.out_norm.weight", f"{resampler}.after_norm.weight")
    for mine, published in pairs:
        for kind in ("weight", "bias"):
            yield rename(f"{ours}.{mine}.{kind}", f"{published}.{kind}")


_SHARED: dict[str, Any] = {
    "config": ernie4_5_vl_config,
    "rules": ernie4_5_vl_rules,
    "tied": tied_head,
    "optional": {"correction biases of its routers": r".*\.moe_statics\.e_score_correction_bias"},
}
ERNIE4_5_VL = register_converter(
    Converter(
        name="ernie4_5_vl",
        model_types=(NESTED,),
        spellings={r"^vision_model\.": "model.vision_model."},
        **_SHARED,
    )
)
ERNIE4_5_VL_FLAT = register_converter(
    Converter(
        name="ernie4_5_vl_flat",
        model_types=(FLAT,),
        spellings={r"^model\.vision_model\.": "vision_model."},
        **_SHARED,
    )
)
