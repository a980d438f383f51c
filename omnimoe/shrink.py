"""A small copy of a model, for tests and for a first step on a laptop."""

from __future__ import annotations

from typing import Any

from omnimoe.encoders.merged import Cosmos3Edge, Merged, Qwen3VL
from omnimoe.encoders.nested_stem import NestedStem
from omnimoe.encoders.patch_stem import PatchStem
from omnimoe.encoders.rotary_vit import RotaryViT
from omnimoe.encoders.siglip import Siglip
from omnimoe.encoders.wave_stem import WaveStem
from omnimoe.layers import LatentAttention, SpanTables
from omnimoe.modalities import CodedPictures, Connected, Deep, GridPatches
from omnimoe.model import OmniMoeConfig


def shrink(config: OmniMoeConfig, *, hidden_size: int = 64, num_layers: int = 2) -> OmniMoeConfig:
    """A copy small enough to step in milliseconds, with towers, routers, experts, mask and modalities kept.

    Args:
        config: of any model.
        hidden_size: a multiple of 16.
        num_layers: layers to keep; ranges of changed layers are moved so that the first of each is kept.
    """
    fresh = iter(range(3, 64))
    widths = tuple(max(2, hidden_size * width // config.hidden_size // 2 * 2) for width in config.widths)
    head_dim = hidden_size // 4 if widths else None
    markers: dict[int, int] = {}

    def moved(token: int | None) -> int | None:
        if token is None:
            return None
        if token not in markers:
            markers[token] = next(fresh)
        return markers[token]

    def attention(part: Any) -> Any:
        if part is None or not hasattr(part, "num_heads"):
            return part
        if isinstance(part, LatentAttention.Config):
            narrow = {"latent_rank": 16, "plain_dim": 16, "rope_dim": 8, "value_dim": 16}
            return part.replace(num_heads=4, query_rank=None if part.query_rank is None else 32, **narrow)
        groups = part.num_heads // (part.num_kv_heads or part.num_heads)
        turned = part.rope
        if turned is not None and turned.sections:
            axes = len(turned.sections)
            turned = turned.replace(sections=(hidden_size // 8 - (axes - 1), *(1,) * (axes - 1)))
        elif turned is not None and turned.axes:
            turned = turned.replace(axes=tuple(place % turned.num_axes for place in range(hidden_size // 8)))
        return part.replace(num_heads=4, num_kv_heads=max(1, 4 // groups), head_dim=head_dim, rope=turned)

    def experts(part: Any) -> Any:
        if part is None or not hasattr(part, "intermediate_size"):
            return part
        narrow: dict[str, Any] = {"intermediate_size": 3 * hidden_size // 2}
        if getattr(part, "shared_intermediate_size", None) is not None:
            narrow["shared_intermediate_size"] = hidden_size
        if getattr(part, "pools", ()):
            widest = max(width for _, width in part.pools)
            narrow["pools"] = tuple(
                (count, max(8, narrow["intermediate_size"] * width // widest // 8 * 8)) for count, width in part.pools
            )
        if getattr(part, "intermediate_sizes", ()):
            largest = max(part.intermediate_sizes)
            narrow["intermediate_sizes"] = tuple(
                max(2, narrow["intermediate_size"] * size // largest) for size in part.intermediate_sizes
            )
        return part.replace(**narrow)

    modalities: list[Any] = []
    for modality in config.modalities:
        small: dict[str, Any] = {"begin_id": moved(modality.begin_id), "end_id": moved(modality.end_id)}
        if modality.num_tokens is not None:
            small["num_tokens"] = 4
        if modality.placeholder_id is not None and (modality.placeholder_id >= 64 or config.published):
            small["placeholder_id"] = moved(modality.placeholder_id)
        if isinstance(modality, Connected.Config | GridPatches.Config) and modality.max_side:
            small["max_side"] = 8
        if isinstance(modality, Connected.Config) and isinstance(modality.encoder, Siglip.Config):
            narrow = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "max_side": 8}
            small |= {"encoder": modality.encoder.replace(**narrow), "channels": 32}
        if isinstance(modality, Connected.Config) and isinstance(modality.encoder, PatchStem.Config):
            stem = modality.encoder.replace(hidden_size=hidden_size, image_size=2 * modality.encoder.patch_size)
            small |= {"encoder": stem, "channels": hidden_size, "num_tokens": stem.num_rows}
        if isinstance(modality, Connected.Config) and isinstance(modality.encoder, NestedStem.Config):
            nested = modality.encoder.replace(hidden_size=hidden_size, image_size=32)
            small |= {"encoder": nested, "channels": hidden_size, "num_tokens": nested.num_rows}
        if isinstance(modality, Connected.Config) and isinstance(modality.encoder, WaveStem.Config):
            waves = modality.encoder.replace(hidden_size=hidden_size, inner_size=32, position_groups=4)
            small |= {"encoder": waves, "channels": hidden_size}
        if modality.more_ids:
            small["more_ids"] = tuple(tuple(moved(token) for token in ids) for ids in modality.more_ids)
        if isinstance(modality, Connected.Config) and isinstance(modality.encoder, RotaryViT.Config):
            narrow = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2}
            encoder = modality.encoder.replace(**narrow, patch_size=4, out_size=hidden_size)
            small |= {"encoder": encoder, "channels": hidden_size}
        if isinstance(modality, Deep.Config) and isinstance(modality.encoder, Merged.Config):
            narrow = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "num_places": 16}
            encoder = modality.encoder.replace(**narrow, patch_size=4, out_size=hidden_size)
            if isinstance(encoder, Qwen3VL.Config):
                encoder = encoder.replace(deep_layers=encoder.deep_layers and (0,))
            elif isinstance(encoder, Cosmos3Edge.Config):
                encoder = encoder.replace(merger_size=48)
            small |= {"encoder": encoder, "depth": encoder.depth, "channels": hidden_size * (1 + encoder.depth)}
        if modality.is_discrete:
            small |= {"vocab_size": 64 if not modalities else 16, "vocab_start": None}
        if isinstance(modality, CodedPictures.Config):
            narrow = {"image_size": 4, "channels": 32, "multipliers": (1, 2), "num_blocks": 1, "attention_sizes": ()}
            narrow |= {"latent_channels": 4, "code_channels": 4, "num_codes": 16}
            small |= {"autoencoder": modality.autoencoder.replace(**narrow), "codes": ()}
        modalities.append(modality.replace(**small))
    # a token of a large vocabulary would lie outside of the small one
    specials = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    kept = {name: token if isinstance(token, int) and token < 64 else moved(token) for name, token in specials.items()}
    bias = config.position_bias
    if isinstance(bias, SpanTables.Config):
        bias = bias.replace(sides=tuple(min(side, 2) for side in bias.sides))
    return config.replace(
        **kept,
        position_bias=bias,
        aligned_size=config.aligned_size and hidden_size,
        hidden_size=hidden_size,
        widths=widths,
        num_layers=num_layers,
        modalities=tuple(modalities),
        attention=attention(config.attention),
        experts=experts(config.experts),
        layers=tuple(
            part.replace(
                start=min(part.start, num_layers - 1),
                stop=None,
                attention=attention(part.attention),
                experts=experts(part.experts),
            )
            for part in config.layers
        ),
        max_position_embeddings=128,
    )
