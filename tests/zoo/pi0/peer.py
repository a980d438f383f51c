"""transformers' pi0 beside ours, with the same weights, and batches for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PI0Config, PI0ForConditionalGeneration

from omnimoe.denoise import denoise
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.pi0.convert import ACTION, PI0, SEEN, STATE

TINY = {"width": 32, "inner": 48, "acts": 16, "acts_inner": 40, "layers": 2, "heads": 4, "head_dim": 8}
"""Of the two towers; those of the action tower are odd fractions of the other's."""


def published(
    *,
    width: int,
    inner: int,
    acts: int,
    acts_inner: int,
    layers: int,
    heads: int,
    head_dim: int,
    vocab: int = 128,
    chunk: int = 5,
    side: int = 2,
    state: int = 6,
    channels: int = 7,
) -> dict[str, Any]:
    """A config as transformers publishes it; pictures are ``side`` patches of 14 pixels wide."""
    shared = {"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": head_dim, "num_hidden_layers": layers}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 36,
        "patch_size": 14,
        "image_size": 14 * side,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vision_use_head": False,
    }
    text = {"model_type": "gemma", "hidden_size": width, "intermediate_size": inner, "vocab_size": vocab, **shared}
    return {
        "model_type": "pi0",
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": vision,
            "projection_dim": width,
            "image_token_index": vocab,
        },
        "dit_config": {"model_type": "gemma", "hidden_size": acts, "intermediate_size": acts_inner, **shared},
        "chunk_size": chunk,
        "max_state_dim": state,
        "max_action_dim": channels,
    }


def make_peer(plain: dict[str, Any], *, noise: float = 0.3) -> PI0ForConditionalGeneration:
    """The reference with random weights, norms and biases among them."""
    read = {key: value for key, value in plain.items() if key != "model_type"}
    peer = PI0ForConditionalGeneration(PI0Config(**read)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * (noise if parameter.ndim > 1 else 0.1))
    return peer


PLACES = {
    "model.vlm.language_model.embed_tokens": "paligemma_with_expert.paligemma.lm_head",
    "model.dit.embed_tokens": "paligemma_with_expert.gemma_expert.lm_head",
    "model.vlm.vision_tower": "paligemma_with_expert.paligemma.model.vision_tower.vision_model",
    "model.vlm": "paligemma_with_expert.paligemma.model",
    "model.dit": "paligemma_with_expert.gemma_expert.model",
    "embed_action_time.": "",
}
"""Names of the reference to those of the published files, longest first."""


def published_name(name: str) -> str:
    """The name that lerobot's checkpoints give a parameter of the reference."""
    for ours, theirs in PLACES.items():
        if name.startswith(ours):
            return "model." + theirs + name.removeprefix(ours)
    return "model." + name


def equal_weights(peer: nn.Module, plain: dict[str, Any]) -> OmniMoeForCausalLM:
    """Our model with the weights of the reference, by the converter's table."""
    model = OmniMoeForCausalLM(PI0.config_of(plain)).eval()
    held = {published_name(name): parameter for name, parameter in peer.state_dict().items()}
    ours = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for piece in PI0.plan(model).pieces:
            piece.place(ours[piece.ours]).copy_(piece.change.into(held[piece.published]))
    return model


def save_published(peer: nn.Module, path) -> None:
    """Its weights under the published names."""
    save_file({published_name(name): held.contiguous() for name, held in peer.state_dict().items()}, path)


@dataclass
class Episode:
    """One sample: pictures ``(cameras, 3, H, W)`` in [-1, 1], ids of the words, a state and actions with noise."""

    pictures: Tensor
    words: list[int]
    state: Tensor
    actions: Tensor
    time: float


def episodes(plain: dict[str, Any], cameras: tuple[int, ...], words: tuple[int, ...], seed: int = 0) -> list[Episode]:
    """A sample for each count of cameras and words."""
    generator = torch.Generator().manual_seed(seed)
    side = plain["vlm_config"]["vision_config"]["image_size"]
    found = []
    for count, length in zip(cameras, words, strict=True):
        found.append(
            Episode(
                torch.rand(count, 3, side, side, generator=generator) * 2 - 1,
                torch.randint(3, 90, (length,), generator=generator).tolist(),
                torch.randn(plain["max_state_dim"], generator=generator),
                torch.randn(plain["chunk_size"], plain["max_action_dim"], generator=generator),
                float(torch.rand((), generator=generator)),
            )
        )
    return found


def prefix(episode: Episode, place: int, tokens: int, *, mixed: bool = False) -> list[int]:
    """Ids of what a sample sees and is told, pictures first as published, or a word before each of them."""
    if not mixed:
        return [place] * (tokens * len(episode.pictures)) + episode.words
    words, found = list(episode.words), []
    for _ in episode.pictures:
        found += [*words[:1], *[place] * tokens]
        words = words[1:]
    return found + words


def for_peer(plain: dict[str, Any], held: list[Episode], *, mixed: bool = False) -> dict[str, Tensor]:
    """The batch of the reference: words padded on the right, missing cameras left out."""
    vision = plain["vlm_config"]["vision_config"]
    tokens, image = (vision["image_size"] // vision["patch_size"]) ** 2, plain["vlm_config"]["image_token_index"]
    rows = [prefix(episode, image, tokens, mixed=mixed) for episode in held]
    length, most = max(map(len, rows)), max(len(episode.pictures) for episode in held)
    pictures = torch.zeros(len(held), most, 3, vision["image_size"], vision["image_size"])
    for row, episode in enumerate(held):
        pictures[row, : len(episode.pictures)] = episode.pictures
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": pictures,
        "pixel_attention_mask": torch.tensor(
            [[i < len(episode.pictures) for i in range(most)] for episode in held], dtype=torch.bool
        ),
        "state": torch.stack([episode.state for episode in held]),
        "noise": torch.stack([episode.actions for episode in held]),
        "timestep": torch.tensor([episode.time for episode in held]),
    }


def for_ours(
    model: OmniMoeForCausalLM, held: list[Episode], side: str = "left", *, mixed: bool = False
) -> dict[str, Any]:
    """The same for our model, padded on one side."""
    encoder = model.model.modalities["vision"].get_encoder()
    cells = [encoder.cells(picture.permute(1, 2, 0)) for episode in held for picture in episode.pictures]
    counts = [len(part.flatten(0, 1)) for part in cells]
    tokens = counts[0] if counts else 0
    rows = [[*prefix(episode, SEEN, tokens, mixed=mixed), STATE, *[ACTION] * len(episode.actions)] for episode in held]
    length = max(map(len, rows))
    empty = [[0] * (length - len(row)) for row in rows]
    pairs = list(zip(rows, empty, strict=True))
    features: dict[str, Any] = {"state": torch.stack([episode.state for episode in held]).unsqueeze(1)}
    features["action"] = torch.cat([episode.actions for episode in held])
    if cells:
        features["vision"] = encoder.pad(cells)
    times = torch.tensor([episode.time for episode in held])
    return {
        "input_ids": torch.tensor([row + pad if side == "right" else pad + row for row, pad in pairs]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + pad if side == "right" else pad + [1] * len(row) for row, pad in pairs]
        ),
        "features": features,
        "timesteps": {"action": times.repeat_interleave(len(held[0].actions))},
    }


def at_benchmark_size(layers: int = 8) -> tuple[OmniMoeForCausalLM, PI0ForConditionalGeneration, dict, dict]:
    """Both at hidden 512 with equal weights, and a batch for each: for timing them side by side."""
    sizes = {"width": 512, "inner": 1024, "acts": 256, "acts_inner": 512, "heads": 8, "head_dim": 64}
    plain = published(layers=layers, vocab=1024, chunk=50, side=16, state=32, channels=32, **sizes)
    peer = make_peer(plain, noise=0.02)
    model = equal_weights(peer, plain)
    held = episodes(plain, (1, 1), (20, 20))
    return model, peer, for_ours(model, held), for_peer(plain, held)


@torch.no_grad()
def cases() -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Ours and theirs: all of two samples once, and their actions in ten steps."""
    torch.manual_seed(0)
    model, peer, given, theirs = at_benchmark_size()
    features = {name: held for name, held in given["features"].items() if name != "action"}
    layout = {name: given[name] for name in ("input_ids", "attention_mask")}
    drawn = {name: held for name, held in theirs.items() if name != "timestep"}
    shape, noise = theirs["noise"].shape, given["features"]["action"]
    return {
        "velocities": (
            lambda: model(**given, logits_to_keep=torch.arange(0)).predictions["action"].view(shape),
            lambda: peer(**theirs).logits,
        ),
        "actions": (
            lambda: denoise(model, "action", **layout, features=features, noise=noise, steps=10).view(shape),
            lambda: peer.sample_actions(**drawn),
        ),
    }
