"""Documents of text and pictures, and the batch that our model takes for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.zoo.bagel.convert import BEGIN, BOS, DRAWN, END, EOS, SEEN

LLM = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
VIT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "image_size": 84,
    "patch_size": 14,
}


@dataclass
class Text:
    """Ids without their begin and end."""

    ids: list[int]


@dataclass
class Seen:
    """Patches ``(rows, columns, 588)`` that go through the vision encoder."""

    patches: Tensor


@dataclass
class Latent:
    """Latent patches ``(rows, columns, 64)`` as they enter, noise added, and their time; 0 for a condition."""

    rows: Tensor
    time: float = 0.0


Document = list[Text | Seen | Latent]


def documents(seed: int = 0) -> list[Document]:
    """Every kind of picture before and after text, shapes that are no squares, one document without pictures."""
    generator = torch.Generator().manual_seed(seed)

    def seen(rows: int, columns: int) -> Seen:
        return Seen(torch.randn(rows, columns, 588, generator=generator))

    def latent(rows: int, columns: int, time: float = 0.0) -> Latent:
        return Latent(torch.randn(rows, columns, 64, generator=generator), time)

    return [
        [Text([5, 6, 7]), seen(2, 3), Text([8, 9]), latent(2, 2), Text([10])],
        [seen(3, 2), latent(3, 2), Text([11, 12]), latent(2, 3, 0.7), Text([13, 14, 15])],
        [Text([16, 17, 18, 19, 20])],
        [latent(1, 3, 1.0), Text([21]), seen(1, 1)],
    ]


def tokens(document: Document) -> list[int]:
    """The ids of a document, placeholders where pictures stand."""
    found: list[int] = []
    for part in document:
        if isinstance(part, Text):
            found += [BOS, *part.ids, EOS]
        else:
            cells, place = (part.patches, SEEN) if isinstance(part, Seen) else (part.rows, DRAWN)
            found += [BEGIN, *[place] * (cells.shape[0] * cells.shape[1]), END]
    return found


def batch(model, held: list[Document], side: str = "right") -> dict:
    """What ``model`` takes for documents, padded on one side."""
    rows = [tokens(document) for document in held]
    length = max(map(len, rows))
    empty = [[0] * (length - len(row)) for row in rows]
    ids = [row + pad if side == "right" else pad + row for row, pad in zip(rows, empty, strict=True)]
    mask = [
        [1] * len(row) + pad if side == "right" else pad + [1] * len(row) for row, pad in zip(rows, empty, strict=True)
    ]
    parts = [part for document in held for part in document]
    seen = [part.patches for part in parts if isinstance(part, Seen)]
    latents = [part for part in parts if isinstance(part, Latent)]
    given: dict = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "features": {}}
    if seen:
        given["features"]["vision"] = model.model.modalities["vision"].get_encoder().pad(seen)
    if latents:
        given["features"]["image"] = [part.rows for part in latents]
        given["timesteps"] = {"image": torch.tensor([part.time for part in latents])}
    return given
