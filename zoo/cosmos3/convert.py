"""Checkpoints of Cosmos3: a reasoner and a generator side by side in ``transformer/``, a vision tower beside them.

The folder is one of diffusers with a reasoner of transformers laid over it: both read the same tensors, each its own
part of them, by their own names. Nano and Super are Qwen3-VL with a second tower; Edge is a Nemotron with networks of
squared ReLU, whose first tower has no norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omnimoe import Attention, CheckpointError, FeedForward, Norm, OmniMoeConfig, ReaderAttention, Rope, Tokens
from omnimoe.convert import Converter, Rule, bank, register_converter, rename
from omnimoe.convert.changes import Chain, Reshape, Transpose
from omnimoe.convert.converter import JsonFiles
from omnimoe.encoders.merged import Cosmos3Edge, Merged, Qwen3VL
from omnimoe.modalities import Deep, DomainPatches, Modality, TimedPatches

ROOT, TRANSFORMER = "config.json", "transformer/config.json"
VISION = "vision_encoder."
"""Prefix of the names that lie in ``vision_encoder/``."""
DRAWN = ("video", "sound", "action")
"""What the generator makes."""
MARGIN = 15_000
"""Places in time between the words and what is generated from them."""
BASE_FPS = 24.0
"""Pictures a second at which one place in time is one latent picture."""
COMPRESSION = 4
"""Pictures of a latent one, after the first."""
_HELD = {"cosmos3_omni": (151_654, 151_670, 151_671), "cosmos3_edge": (996, 997, 998)}
"""Ids that stand where latents of pictures, sounds and actions are. The checkpoints have no such tokens; any would do
that is no word."""
_FIXED = {
    "position_embedding_type": "unified_3d_mrope",
    "joint_attn_implementation": "two_way",
    "video_temporal_causal": False,
    "qk_norm_for_diffusion": True,
    "unified_3d_mrope_temporal_modality_margin": MARGIN,
    "unified_3d_mrope_reset_spatial_ids": True,
    "enable_fps_modulation": True,
    "base_fps": 24,
    "timestep_scale": 0.001,
}
_SITES = {"q_proj": ("to_q", "add_q_proj"), "k_proj": ("to_k", "add_k_proj"), "v_proj": ("to_v", "add_v_proj")}
_SITES["o_proj"] = ("to_out", "to_add_out")
_ACTIVATIONS = {"silu": "silu", "relu2": "relu2"}


def rope_axes(sections: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """The axis of each frequency: height and width have every third one, as many as their sections say.

    Example:
        >>> rope_axes((4, 2, 2))
        (0, 1, 2, 0, 1, 2, 0, 0)
    """
    axes = [0] * sum(sections)
    for axis, count in ((1, sections[1]), (2, sections[2])):
        axes[axis : 3 * count : 3] = [axis] * count
    return tuple(axes)


def cosmos3_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for the published ones of the transformer and of the whole."""
    whole, plain = files[ROOT], files[TRANSFORMER]
    for name, value in _FIXED.items():
        if plain.get(name, value) != value:
            raise CheckpointError(f"{name} is {plain[name]!r} in {TRANSFORMER}, and only {value!r} is converted")
    if plain["patch_latent_dim"] != plain["latent_channel"] * plain["latent_patch_size"] ** 2:
        raise CheckpointError(
            f"patch_latent_dim {plain['patch_latent_dim']} is not latent_channel {plain['latent_channel']} times the "
            f"square of latent_patch_size {plain['latent_patch_size']}"
        )
    text = whole.get("text_config", {})
    modalities = _modalities(whole, plain)
    towers = tuple(int(held.name in DRAWN) for held in modalities)
    eps = plain.get("rms_norm_eps", 1e-6)
    norm = Norm.Config(eps=eps, towers=towers)
    is_gated = plain.get("hidden_act", "silu") == "silu"
    return OmniMoeConfig(
        hidden_size=plain["hidden_size"],
        num_layers=plain["num_hidden_layers"],
        modalities=modalities,
        attention=_attention(plain, towers, eps),
        experts=FeedForward.Config(
            intermediate_size=plain["intermediate_size"],
            activation=_ACTIVATIONS[plain.get("hidden_act", "silu")],
            gated=is_gated,
            towers=towers,
        ),
        norm=norm,
        final_norm=norm,
        mask="block_causal",
        bidirectional_modalities=tuple(held.name for held in modalities if held.name in DRAWN),
        joint_blocks=True,
        private_blocks=True,
        positions="grids",
        initializer_range=plain.get("initializer_range", 0.02),
        max_position_embeddings=plain.get("max_position_embeddings", text.get("max_position_embeddings", 131_072)),
        bos_token_id=text.get("bos_token_id", whole.get("bos_token_id")),
        eos_token_id=text.get("eos_token_id", whole.get("eos_token_id")),
        pad_token_id=text.get("pad_token_id", whole.get("pad_token_id")),
    )


def _attention(plain: dict[str, Any], towers: tuple[int, ...], eps: float) -> Attention.Config:
    sections = plain.get("rope_axes_dim") or (plain.get("rope_scaling") or {}).get("mrope_section") or (24, 20, 20)
    fields: dict[str, Any] = {
        "num_heads": plain["num_attention_heads"],
        "num_kv_heads": plain["num_key_value_heads"],
        "head_dim": plain["head_dim"],
        "bias": plain.get("attention_bias", False),
        "output_bias": plain.get("attention_bias", False),
        "qk_norm": "rms",
        "qk_norm_eps": eps,
        "rope": Rope.Config(theta=float(plain["rope_theta"]), axes=rope_axes(sections)),
        "towers": towers,
    }
    if plain.get("qk_norm_for_text", True):
        return Attention.Config(**fields)
    if not plain.get("use_und_k_norm_for_gen", False):
        raise CheckpointError(
            "qk_norm_for_text is False without use_und_k_norm_for_gen, which no published model has and is not read"
        )
    return ReaderAttention.Config(**fields, readers=tuple(bool(tower) for tower in towers))


def _modalities(whole: dict[str, Any], plain: dict[str, Any]) -> tuple[Modality.Config, ...]:
    pictures, sounds, actions = _HELD[whole["model_type"]]
    # a vocabulary that was cut down has none of these rows: the last ones stand for them
    places = [min(token, plain["vocab_size"] - 3 + place) for place, token in enumerate((pictures, sounds, actions))]
    tower = _tower(whole, plain["hidden_size"])
    found: list[Modality.Config] = [
        Tokens.Config(name="text", vocab_size=plain["vocab_size"]),
        Deep.Config(
            name="vision",
            channels=plain["hidden_size"] * (1 + tower.depth),
            depth=tower.depth,
            encoder=tower,
            begin_id=whole["vision_start_token_id"],
            end_id=whole["vision_end_token_id"],
            placeholder_id=whole["image_token_id"],
            more_ids=((whole["vision_start_token_id"], whole["vision_end_token_id"], whole["video_token_id"]),),
        ),
        TimedPatches.Config(name="video", channels=plain["patch_latent_dim"], placeholder_id=places[0]),
    ]
    shared: dict[str, Any] = {"time_of": "video", "is_marked": True}
    if plain.get("sound_gen"):
        width = plain["sound_dim"]
        found.append(TimedPatches.Config(name="sound", channels=width, placeholder_id=places[1], **shared))
    if plain.get("action_gen"):
        domains = plain.get("num_embodiment_domains", 32)
        width = plain["action_dim"]
        found.append(
            DomainPatches.Config(name="action", channels=width, num_domains=domains, placeholder_id=places[2], **shared)
        )
    return tuple(found)


def _tower(whole: dict[str, Any], hidden_size: int) -> Merged.Config:
    vision = whole["vision_config"]
    fields: dict[str, Any] = {
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "patch_size": vision["patch_size"],
        "merge_size": vision.get("spatial_merge_size", 2),
        "activation": vision.get("hidden_act", "gelu_pytorch_tanh"),
        "out_size": hidden_size,
    }
    if whole["model_type"] == "cosmos3_omni":
        return Qwen3VL.Config(
            **fields,
            num_layers=vision["depth"],
            num_heads=vision["num_heads"],
            num_places=vision["num_position_embeddings"],
            temporal_size=vision.get("temporal_patch_size", 2),
            deep_layers=tuple(vision["deepstack_visual_indexes"]),
        )
    merger = whole.get("projector_config", {}).get("merger_intermediate_size")
    return Cosmos3Edge.Config(
        **fields,
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        num_places=vision["num_patches"],
        eps=vision.get("layer_norm_eps", 1e-6),
        merger_size=merger or whole.get("projector_hidden_size", 11_520),
    )


def cosmos3_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield rename("model.embed_tokens.weight", "embed_tokens.weight")
    yield bank("model.norm.weight", "norm.weight", "norm_moe_gen.weight")
    yield rename("lm_head.weight", "lm_head.weight")
    for index in range(config.num_layers):
        yield from _layer_rules(config, f"layers.{index}", f"model.backbone.layers.{index}")
    yield from _vision_rules(config.modalities[1].encoder)
    held = {modality.name: modality for modality in config.modalities}
    video = "model.modalities.video"
    for kind in ("weight", "bias"):
        yield rename(f"{video}.time_in.{kind}", f"time_embedder.linear_1.{kind}")
        yield rename(f"{video}.time_out.{kind}", f"time_embedder.linear_2.{kind}")
    for name, prefix in (("video", ""), ("sound", "audio_")):
        for way in ("in", "out") if name in held else ():
            yield rename(f"model.modalities.{name}.{way}_proj", f"{prefix}proj_{way}.weight")
            yield rename(f"model.modalities.{name}.{way}_bias", f"{prefix}proj_{way}.bias")
    if "sound" in held:
        yield rename("model.modalities.sound.marker", "audio_modality_embed")
    if "action" in held:
        yield rename("model.modalities.action.marker", "action_modality_embed")
        count, width, channels = held["action"].num_domains, config.hidden_size, held["action"].channels
        for way, shape in (("in", (count, channels, width)), ("out", (count, width, channels))):
            # a row of the table holds the matrix of a domain, (in, out)
            change = Chain((Reshape((count, channels * width), shape), Transpose()))
            yield rename(f"model.modalities.action.{way}_proj", f"action_proj_{way}.fc.weight", change=change)
            yield rename(f"model.modalities.action.{way}_bias", f"action_proj_{way}.bias.weight")


def _layer_rules(config: OmniMoeConfig, theirs: str, ours: str) -> Iterator[Rule]:
    attention = config.attention
    for mine, name in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        yield bank(f"{ours}.{mine}.weight", f"{theirs}.{name}.weight", f"{theirs}.{name}_moe_gen.weight")
    for site, names in _SITES.items():
        for kind in ("weight", "bias") if attention.bias else ("weight",):
            yield bank(f"{ours}.self_attn.{site}.{kind}", *(f"{theirs}.self_attn.{name}.{kind}" for name in names))
    has_readers = isinstance(attention, ReaderAttention.Config)
    for way in ("q", "k"):
        copies = [f"{theirs}.self_attn.norm_{way}.weight", f"{theirs}.self_attn.norm_added_{way}.weight"]
        yield bank(f"{ours}.self_attn.{way}_norm.weight", *copies[has_readers:])
    if has_readers:
        yield bank(f"{ours}.self_attn.read_norm.weight", f"{theirs}.self_attn.k_norm_und_for_gen.weight")
    networks = (f"{theirs}.mlp", f"{theirs}.mlp_moe_gen")
    into = ("gate_proj", "up_proj") if config.experts.gated else ("up_proj",)
    parts = (tuple(f"{network}.{name}.weight" for name in into) for network in networks)
    yield bank(f"{ours}.mlp.experts.gate_up_proj", *parts)
    yield bank(f"{ours}.mlp.experts.down_proj", *(f"{network}.down_proj.weight" for network in networks))


def _vision_rules(encoder: Any) -> Iterator[Rule]:
    ours = "model.modalities.vision.encoder"
    is_edge = isinstance(encoder, Cosmos3Edge.Config)
    for name in edge_names(encoder) if is_edge else qwen_names(encoder):
        mine = name if is_edge else f"network.{name}"
        yield rename(f"{ours}.{mine}", f"{VISION}model.{name}" if is_edge else f"{VISION}{name}")


def _pairs(*modules: str) -> Iterator[str]:
    for module in modules:
        yield from (f"{module}.weight", f"{module}.bias")


def qwen_names(encoder: Qwen3VL.Config) -> Iterator[str]:
    """Tensors of Qwen3-VL's tower."""
    yield from _pairs("patch_embed.proj")
    yield "pos_embed.weight"
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    for index in range(encoder.num_layers):
        yield from _pairs(*(f"blocks.{index}.{part}" for part in parts))
    mergers = ["merger", *(f"deepstack_merger_list.{index}" for index in range(encoder.depth))]
    yield from _pairs(*(f"{merger}.{part}" for merger in mergers for part in ("norm", "linear_fc1", "linear_fc2")))


def edge_names(encoder: Cosmos3Edge.Config) -> Iterator[str]:
    """Tensors of Cosmos3 Edge's tower and projector."""
    yield from _pairs("visual.embeddings.patch_embedding", "visual.post_layernorm")
    yield "visual.embeddings.position_embedding.weight"
    parts = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    parts += tuple(f"self_attn.{site}_proj" for site in ("q", "k", "v", "out"))
    for index in range(encoder.num_layers):
        yield from _pairs(*(f"visual.encoder.layers.{index}.{part}" for part in parts))
    yield from _pairs(*(f"projector.{part}" for part in ("norm", "linear_fc1", "linear_fc2")))


COSMOS3 = register_converter(
    Converter(
        name="cosmos3",
        model_types=("cosmos3_omni", "cosmos3_edge"),
        json_files=(ROOT, TRANSFORMER),
        weight_files={
            "": "transformer/diffusion_pytorch_model.safetensors",
            VISION: "vision_encoder/model.safetensors",
        },
        config=cosmos3_config,
        rules=cosmos3_rules,
        beside=("model_index.json", "vae", "sound_tokenizer", "scheduler", "text_tokenizer"),
    )
)
