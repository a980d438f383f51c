"""ONE-PEACE, sequence by sequence over the published names: written from the paper and from those names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.zoo.one_peace import published

Weights = dict[str, Tensor]
HEADS, LAYERS = 4, 2
REACHES = {"text": 8, "audio": 12}
STRIDES = (5, 2, 2)
TINY = published(32, 48, LAYERS, HEADS, image_size=32, vocab_size=60)
TINY["encoder"]["text_adapter"]["bucket_size"] = REACHES["text"]
TINY["encoder"]["audio_adapter"] |= {
    "bucket_size": REACHES["audio"],
    "feature_encoder_spec": "[(16, 10, 5)] + [(16, 3, 2)] * 2",
    "conv_pos_depth": 2,
    "conv_pos_width": 14,
    "conv_pos_groups": 4,
}
"""Pictures are 2 x 2 patches, sounds a row for 20 samples."""


def published_list(
    width: int = 1536, inner: int = 6144, layers: int = 40, heads: int = 24, words: int = 50_264
) -> dict:
    """Names and shapes as the authors' code gives them at their settings, but for what goes along."""
    at = "encoder_wrapper"
    text, image, audio = (f"{at}.{kind}_adapter" for kind in ("text", "image", "audio"))
    found: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        f"{text}.embed_tokens.weight": (words, width),
        f"{text}.embed_positions.weight": (514, width),
        f"{image}.pos_embed": (257, width),
        f"{audio}.cls_pos_embed": (1, 1, width),
        f"{text}.rel_pos_table_list.0.weight": (2 * 256 - 1 + 3, heads),
        f"{image}.rel_pos_table_list.0.weight": (31 * 31 + 3, heads),
        f"{audio}.rel_pos_table_list.0.weight": (2 * 512 - 1 + 3, heads),
        f"{image}.embed_images.0.weight": (width // 4, 3, 4, 4),
        f"{image}.embed_images.3.weight": (width // 4, width // 4, 2, 2),
        f"{image}.embed_images.6.weight": (width, width // 4, 2, 2),
        f"{image}.embed_images.6.bias": (width,),
        f"{audio}.embed_audios.3.weight": (width, 512),
        f"{audio}.embed_audios.3.bias": (width,),
    }
    for place in (0, 3):
        found[f"{image}.embed_images.{place}.bias"] = (width // 4,)
        found |= {f"{image}.embed_images.{place + 1}.layer_norm.{kind}": (width // 4,) for kind in ("weight", "bias")}
    for place, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        found[f"{audio}.embed_audios.0.conv_layers.{place}.0.weight"] = (512, 512 if place else 1, kernel)
        found |= {f"{audio}.embed_audios.0.conv_layers.{place}.2.1.{kind}": (512,) for kind in ("weight", "bias")}
    found |= {f"{audio}.embed_audios.2.{kind}": (512,) for kind in ("weight", "bias")}
    for place in range(1, 6):
        found[f"{audio}.embed_positions.{place}.0.weight"] = (width, width // 16, 19)
        found[f"{audio}.embed_positions.{place}.0.bias"] = (width,)
    norms = [f"{at}.fusion_model.{kind}_layer_norm" for kind in ("text", "image", "audio")]
    for kind in ("text", "image", "audio"):
        found[f"{at}.{kind}_adapter.cls_embedding"] = (1, 1, width)
        found |= {f"{kind}_proj.weight": (width, width), f"{kind}_proj.bias": (width,)}
    for layer in range(layers):
        into = f"{at}.fusion_model.layers.{layer}"
        norms += [f"{into}.self_attn_layer_norm", f"{into}.final_layer_norm", f"{into}.self_attn.ln"]
        found |= {f"{into}.gamma_1": (width,), f"{into}.gamma_2": (width,)}
        for site in ("q", "k", "v", "out"):
            found[f"{into}.self_attn.{site}_proj.weight"] = (width, width)
            found |= {} if site == "k" else {f"{into}.self_attn.{site}_proj.bias": (width,)}
        for kind in ("text", "image", "audio"):
            ffn = f"{into}.{kind}_ffn"
            found |= {f"{ffn}.0.wi_0.weight": (inner, width), f"{ffn}.0.wi_1.weight": (inner, width)}
            found |= {f"{ffn}.2.weight": (inner,), f"{ffn}.2.bias": (inner,)}
            found |= {f"{ffn}.3.weight": (width, inner), f"{ffn}.3.bias": (width,)}
    return found | {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def line(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def text_rows(w: Weights, words: list[int]) -> Tensor:
    at = "encoder_wrapper.text_adapter"
    rows = torch.cat((w[f"{at}.cls_embedding"].view(1, -1), w[f"{at}.embed_tokens.weight"][words]))
    return rows + w[f"{at}.embed_positions.weight"][: len(rows)]


def picture_rows(w: Weights, pixels: Tensor) -> Tensor:
    at, x = "encoder_wrapper.image_adapter", pixels[None]
    for place, side in ((0, 4), (3, 2), (6, 2)):
        x = F.conv2d(x, w[f"{at}.embed_images.{place}.weight"], w[f"{at}.embed_images.{place}.bias"], stride=side)
        if place < 6:
            x = F.gelu(norm(x.permute(0, 2, 3, 1), w, f"{at}.embed_images.{place + 1}.layer_norm")).permute(0, 3, 1, 2)
    return torch.cat((w[f"{at}.cls_embedding"].view(1, -1), x[0].flatten(1).T)) + w[f"{at}.pos_embed"]


def sound_rows(w: Weights, wave: Tensor) -> Tensor:
    at, x = "encoder_wrapper.audio_adapter", wave[None, None]
    for place, stride in enumerate(STRIDES):
        into = f"{at}.embed_audios.0.conv_layers.{place}"
        x = F.conv1d(x, w[f"{into}.0.weight"], stride=stride)
        x = F.gelu(norm(x.transpose(1, 2), w, f"{into}.2.1")).transpose(1, 2)
    rows = line(norm(x[0].T, w, f"{at}.embed_audios.2"), w, f"{at}.embed_audios.3")
    place = rows
    for layer in (1, 2):
        name = f"{at}.embed_positions.{layer}.0"
        kernel = w[f"{name}.weight"]
        seen = F.conv1d(place.T[None], kernel, w[f"{name}.bias"], padding=kernel.shape[2] // 2, groups=4)[0].T
        place = F.gelu(F.layer_norm(seen, seen.shape[-1:]))
    whole = w[f"{at}.cls_embedding"].view(1, -1) + w[f"{at}.cls_pos_embed"].view(1, -1)
    return torch.cat((whole, rows + place))


def bias_row(kind: str, query: int, key: int) -> int:
    """The row of a modality's table for two places, 0 being that of the whole."""
    reach, side = REACHES.get(kind, 0), 2
    end = 2 * reach - 1 if reach else (2 * side - 1) ** 2
    if query == 0 or key == 0:
        return end + 2 if query == key else end + (query != 0)
    if not reach:
        (row, column), (row_of_key, column_of_key) = divmod(query - 1, side), divmod(key - 1, side)
        return (row - row_of_key + side - 1) * (2 * side - 1) + column - column_of_key + side - 1
    apart, middle = query - key, reach // 2
    if abs(apart) > middle:
        far = math.log(abs(apart) / middle) / math.log(1023 / middle) * (middle - 1)
        apart = int(math.copysign(middle + math.ceil(far), apart))
    return apart + reach - 1


def rows_of(w: Weights, parts: list[tuple[str, object]]) -> Tensor:
    """``(n, D)`` behind the last norm, of a sequence of spans, each a modality and its words, pixels or samples."""
    made = {"text": text_rows, "image": picture_rows, "audio": sound_rows}
    spans = [made[kind](w, given) for kind, given in parts]
    kinds = [kind for (kind, _), span in zip(parts, spans, strict=True) for _ in span]
    x, stack = torch.cat(spans), "encoder_wrapper.fusion_model"
    bias = torch.zeros(HEADS, len(x), len(x), dtype=x.dtype)
    start = 0
    for (kind, _), span in zip(parts, spans, strict=True):
        table = w[f"encoder_wrapper.{kind}_adapter.rel_pos_table_list.0.weight"]
        index = [[bias_row(kind, query, key) for key in range(len(span))] for query in range(len(span))]
        block = F.pad(table[torch.tensor(index)].permute(2, 0, 1), (start, len(x) - start - len(span)) * 2)
        bias, start = bias + block, start + len(span)
    for layer in range(LAYERS):
        at = f"{stack}.layers.{layer}"
        inner = norm(x, w, f"{at}.self_attn_layer_norm")
        q, k, v = (line(inner, w, f"{at}.self_attn.{site}_proj").view(len(x), HEADS, -1) for site in "qkv")
        scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5 + bias
        mixed = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1)
        x = x + w[f"{at}.gamma_1"] * line(norm(mixed, w, f"{at}.self_attn.ln"), w, f"{at}.self_attn.out_proj")
        rows = []
        for row, kind in zip(norm(x, w, f"{at}.final_layer_norm"), kinds, strict=True):
            ffn = f"{at}.{kind}_ffn"
            wide = F.gelu(w[f"{ffn}.0.wi_0.weight"] @ row) * (w[f"{ffn}.0.wi_1.weight"] @ row)
            rows.append(line(norm(wide, w, f"{ffn}.2"), w, f"{ffn}.3"))
        x = x + w[f"{at}.gamma_2"] * torch.stack(rows)
    return torch.stack([norm(row, w, f"{stack}.{kind}_layer_norm") for row, kind in zip(x, kinds, strict=True)])


def vector(w: Weights, kind: str, given: object) -> Tensor:
    """``(D,)``, what a text, a picture or a sound is compared by."""
    return F.normalize(line(rows_of(w, [(kind, given)])[0], w, f"{kind}_proj"), dim=0)
