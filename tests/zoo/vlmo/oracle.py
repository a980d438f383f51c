"""VLMo, row by row over the published names: written from the paper and from what the published files are called."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
TINY: dict[str, Any] = {
    "model_type": "vlmo",
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "vlffn_start_layer_index": 2,
    "image_size": 12,
    "patch_size": 4,
    "vocab_size": 60,
    "max_text_len": 8,
    "max_text_len_of_initckpt": 10,
    "heads": ["words", "pairs", "aligned"],
}
"""Pictures are 3 x 3 patches of 4 pixels."""


def published_list(width: int, depth: int, heads: int, joint_from: int, side: int, words: int = 196) -> dict:
    """Names and shapes of a pre-trained file, but for what goes along: names as the authors' code gives them."""
    cells, vocab, wide = (2 * side - 1) ** 2 + 3, 30_522, 4 * width
    found: dict[str, tuple[int, ...]] = {
        "relative_position_bias_table": (cells + 2 * words + 2, heads * depth),
        "logit_scale": (),
        "text_embeddings.word_embeddings.weight": (vocab, width),
        "text_embeddings.token_type_embeddings.weight": (2, width),
        "token_type_embeddings.weight": (2, width),
        "transformer.cls_token": (1, 1, width),
        "transformer.patch_embed.proj.weight": (width, 3, 16, 16),
        "transformer.patch_embed.proj.bias": (width,),
        "mlm_score.bias": (vocab,),
        "mlm_score.decoder.weight": (vocab, width),
        "mlm_score.transform.dense.weight": (width, width),
        "mlm_score.transform.dense.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
        "itm_score.fc.weight": (2, width),
        "itm_score.fc.bias": (2,),
        "itc_text_proj.fc.weight": (width, width),
        "itc_image_proj.fc.weight": (width, width),
    }
    norms = ["text_embeddings.LayerNorm", "mlm_score.transform.LayerNorm", "transformer.norm"]
    for layer in range(depth):
        at = f"transformer.blocks.{layer}"
        found |= {f"{at}.gamma_1": (width,), f"{at}.gamma_2": (width,)}
        found |= {f"{at}.attn.q_bias": (width,), f"{at}.attn.v_bias": (width,), f"{at}.attn.proj.bias": (width,)}
        found |= {f"{at}.attn.qkv.weight": (3 * width, width), f"{at}.attn.proj.weight": (width, width)}
        norms.append(f"{at}.norm1")
        for copy in ("text", "imag", *(("vl",) if layer >= joint_from else ())):
            norms.append(f"{at}.norm2_{copy}")
            into = f"{at}.mlp_{copy}"
            found |= {f"{into}.fc1.weight": (wide, width), f"{into}.fc1.bias": (wide,)}
            found |= {f"{into}.fc2.weight": (width, wide), f"{into}.fc2.bias": (width,)}
    return found | {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}


def bias_row(query: tuple[str, int], key: tuple[str, int], side: int, words: int) -> int:
    """The row of the table for two places, each a modality and a number from 0, the whole of a span being 0."""
    cells = (2 * side - 1) ** 2 + 3
    (asks, i), (asked, j) = query, key
    if asks != asked:
        return cells if asks == "text" else cells + 1
    end = cells if asks == "imag" else cells + 2 + 2 * words
    if i == 0 or j == 0:
        return end - 1 if i == j else (end - 3 if i == 0 else end - 2)
    if asks == "text":
        return j - i + words - 2 + cells + 2
    rows, columns = (i - 1) // side - (j - 1) // side, (i - 1) % side - (j - 1) % side
    return (rows + side - 1) * (2 * side - 1) + columns + side - 1


def rows_of(
    w: Weights, plain: dict, pixels: Tensor | None, words: list[int] | None, *, joint: bool | None = None
) -> Tensor:
    """``(n, D)``, the rows of a text and a picture, text first, behind the last norm.

    Args:
        w: tensors by published name.
        plain: the config.
        pixels: ``(3, H, W)``, or None.
        words: ids, or None.
        joint: take the third network in the upper layers; where None, where both are there.
    """
    width, heads, side = plain["embed_dim"], plain["num_heads"], plain["image_size"] // plain["patch_size"]
    joint = (pixels is not None and words is not None) if joint is None else joint

    def norm(row: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        centred = row - row.mean()
        return centred / (centred.square().mean() + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    x, places = [], []
    for place, word in enumerate(words or ()):
        row = w["text_embeddings.word_embeddings.weight"][word] + w["text_embeddings.token_type_embeddings.weight"][0]
        x.append(norm(row, "text_embeddings.LayerNorm", 1e-12) + w["token_type_embeddings.weight"][0])
        places.append(("text", place))
    if pixels is not None:
        kernel, bias = w["transformer.patch_embed.proj.weight"], w["transformer.patch_embed.proj.bias"]
        patches = F.conv2d(pixels[None], kernel, bias, stride=plain["patch_size"])[0].flatten(1).T
        for place, row in enumerate((w["transformer.cls_token"].view(-1), *patches)):
            x.append(row + w["token_type_embeddings.weight"][1])
            places.append(("imag", place))
    table = w["relative_position_bias_table"]
    longest = plain["max_text_len_of_initckpt"]
    index = torch.tensor([[bias_row(query, key, side, longest) for key in places] for query in places])
    for layer in range(plain["depth"]):
        at = f"transformer.blocks.{layer}"
        inner = torch.stack([norm(row, f"{at}.norm1") for row in x])
        no_bias = torch.zeros(width, dtype=table.dtype)
        qkv_bias = torch.cat((w[f"{at}.attn.q_bias"], no_bias, w[f"{at}.attn.v_bias"]))
        q, k, v = (inner @ w[f"{at}.attn.qkv.weight"].T + qkv_bias).view(len(x), 3, heads, -1).unbind(1)
        mixed = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head].T / (width // heads) ** 0.5 + table[index, layer * heads + head]
            mixed.append(torch.softmax(scores, dim=1) @ v[:, head])
        out = torch.cat(mixed, dim=1) @ w[f"{at}.attn.proj.weight"].T + w[f"{at}.attn.proj.bias"]
        x = [row + w[f"{at}.gamma_1"] * added for row, added in zip(x, out, strict=True)]
        for place, (kind, _) in enumerate(places):
            copy = "vl" if joint and layer >= plain["vlffn_start_layer_index"] else kind
            into = f"{at}.mlp_{copy}"
            wide = w[f"{into}.fc1.weight"] @ norm(x[place], f"{at}.norm2_{copy}") + w[f"{into}.fc1.bias"]
            worked = w[f"{into}.fc2.weight"] @ F.gelu(wide) + w[f"{into}.fc2.bias"]
            x[place] = x[place] + w[f"{at}.gamma_2"] * worked
    return torch.stack([norm(row, "transformer.norm") for row in x])


def word_logits(w: Weights, rows: Tensor) -> Tensor:
    """``(n, V)``, the head over words."""
    wide = F.gelu(rows @ w["mlm_score.transform.dense.weight"].T + w["mlm_score.transform.dense.bias"])
    name = "mlm_score.transform.LayerNorm"
    wide = F.layer_norm(wide, wide.shape[1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)
    return wide @ w["mlm_score.decoder.weight"].T + w["mlm_score.bias"]


def pair_logits(w: Weights, rows: Tensor) -> Tensor:
    """``(2,)``, whether the sequence is a pair."""
    pooled = torch.tanh(w["pooler.dense.weight"] @ rows[0] + w["pooler.dense.bias"])
    return w["itm_score.fc.weight"] @ pooled + w["itm_score.fc.bias"]
