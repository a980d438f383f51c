"""transformers' ERNIE-4.5-VL at a tiny size, and documents of words, pictures and clips as it and as we take them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from omnimoe.encoders.rotary_vit import RotaryViT
from omnimoe.modalities import Connected
from omnimoe.model import OmniMoeForCausalLM

VOCAB, START, END, SEEN, CLIP_START, CLIP_END, CLIP = 60, 50, 51, 52, 53, 54, 55
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": [24, 8],
    "moe_num_experts": 6,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [3, 3, 2]},
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
}
IDS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "image_token_id": SEEN,
    "video_start_token_id": CLIP_START,
    "video_end_token_id": CLIP_END,
    "video_token_id": CLIP,
}
Part = int | tuple[int, int, int]
"""So many words, or a picture or a clip of so many patches along time, height and width."""
DOCUMENTS: tuple[tuple[Part, ...], ...] = (
    (3, (1, 4, 6), 2, (4, 2, 4), 2),
    (5,),
    ((1, 2, 2), 1, (1, 6, 2), 4),
    (2, (2, 4, 4), 3),
)


def reference(text: dict | None = None, vision: dict | None = None, markers: dict[str, int] | None = None) -> Any:
    """transformers' model with every weight drawn, biases and norms too."""
    text = {**TEXT, **(text or {})}
    config = Ernie4_5_VLMoeConfig(
        text_config=copy.deepcopy(text),
        vision_config={**VISION, **(vision or {})},
        tie_word_embeddings=text.get("tie_word_embeddings", True),
        **(IDS if markers is None else markers),
    )
    config._attn_implementation = "eager"
    model = Ernie4_5_VLMoeForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("ln.weight")
            tensor.copy_(1 + 0.2 * noise if is_scale else (0.05 if "e_score" in name else 0.2) * noise)
    return model


def publish(model: Any, folder: Path, **options: Any) -> Path:
    """The model in the layout it is published in."""
    model.save_pretrained(folder, **options)
    return folder


def ids_of(document: tuple[Part, ...], seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in document:
        if isinstance(part, int):
            ids += torch.randint(3, 45, (part,), generator=generator).tolist()
            continue
        time, tall, wide = part
        cells = tall * wide // 4
        ids += [START, *[SEEN] * cells, END] if time == 1 else [CLIP_START, *[CLIP] * (time // 2 * cells), CLIP_END]
    return ids


def patches(shape: tuple[int, int, int], size: int) -> Tensor:
    """Of one picture or clip, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(sum(shape))
    time, tall, wide = shape
    return torch.randn(time * tall * wide, 3 * size**2, generator=generator)


def batches(
    model: OmniMoeForCausalLM, documents: tuple[tuple[Part, ...], ...] = DOCUMENTS, side: str = "right"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Documents as our model takes them, and as transformers' does."""
    rows = [ids_of(document, place) for place, document in enumerate(documents)]
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for place, row in enumerate(rows):
        held = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[place, held], mask[place, held] = torch.tensor(row), 1
    seen = [part for document in documents for part in document if not isinstance(part, int)]
    ours: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if seen:
        tower = encoder(model)
        size = tower.config.patch_size
        pixels = torch.cat([patches(shape, size) for shape in seen])
        ours["features"] = {"vision": tower.pad(pixels, torch.tensor(seen))}
    kinds = (ids == SEEN).long() + 2 * (ids == CLIP).long()
    ends = (
        kinds + torch.isin(ids, torch.tensor([START, END])) + 2 * torch.isin(ids, torch.tensor([CLIP_START, CLIP_END]))
    )
    theirs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, "moe_mm_token_type_ids": ends}
    for name, grids in (("image", [s for s in seen if s[0] == 1]), ("video", [s for s in seen if s[0] > 1])):
        if grids:
            pixels = torch.cat([patches(shape, size) for shape in grids])
            theirs["pixel_values" if name == "image" else "pixel_values_videos"] = pixels
            theirs[f"{name}_grid_thw"] = torch.tensor(grids)
    return ours, theirs


def encoder(model: OmniMoeForCausalLM) -> RotaryViT:
    modality = model.model.modalities["vision"]
    assert isinstance(modality, Connected)
    found = modality.get_encoder()
    assert isinstance(found, RotaryViT)
    return found
