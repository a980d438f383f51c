"""torchscale's BEiT-3 beside ours, with the same weights, and batches for both."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.beit3 import BEIT3

TEXT, VISION = 0, 1
TINY = {"width": 32, "layers": 2, "heads": 4, "inner": 48}
"""Pictures are 3 x 3 patches of 4 pixels."""


def torchscale() -> ModuleType:
    """The reference, or a skip. What it takes of fairscale, wrappers for several devices, is left out where missing."""
    pytest.importorskip("torchscale", reason="pip install --no-deps torchscale timm")
    if "fairscale" not in sys.modules and importlib.util.find_spec("fairscale") is None:
        package, part = ModuleType("fairscale"), ModuleType("fairscale.nn")
        vars(part).update(checkpoint_wrapper=lambda module: module, wrap=lambda module: module)
        vars(package).update(nn=part)
        sys.modules |= {"fairscale": package, "fairscale.nn": part}
    return pytest.importorskip("torchscale.model.BEiT3", exc_type=ImportError)


def published(
    *, width: int, layers: int, heads: int, inner: int, vocab: int = 60, kinds: Sequence[str] = ()
) -> dict[str, Any]:
    """A config with the arguments of torchscale's encoder."""
    return {
        "model_type": "beit3",
        "multiway": True,
        "vocab_size": vocab,
        "img_size": 12,
        "patch_size": 4,
        "encoder_embed_dim": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_embed_dim": inner,
        "max_source_positions": 20,
        "no_output_layer": True,
        "heads": list(kinds),
    }


class Peer(nn.Module):
    """The reference with the heads of unilm's ``modeling_finetune``, under the names that they have there."""

    def __init__(self, plain: dict[str, Any]) -> None:
        super().__init__()
        from torchscale.architecture.config import EncoderConfig

        given = {name: value for name, value in plain.items() if name not in ("model_type", "heads")}
        self.beit3 = torchscale().BEiT3(EncoderConfig(**given))
        width = plain["encoder_embed_dim"]
        if "words" in plain["heads"]:
            self.mlm_head = nn.Linear(width, plain["vocab_size"])
        if "aligned" in plain["heads"]:
            self.language_head = nn.Linear(width, width, bias=False)
            self.vision_head = nn.Linear(width, width, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, **given: Any) -> Tensor:
        """``(B, T, D)``, pictures before text."""
        return self.beit3(**given)["encoder_out"]


def make_peer(plain: dict[str, Any], *, noise: float = 0.2) -> Peer:
    """The reference with random weights, norms, biases and learned rows among them."""
    peer = Peer(plain).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return peer


def equal_weights(peer: Peer, plain: dict[str, Any]) -> OmniMoeForCausalLM:
    """Ours with the weights of the reference, by the table."""
    model = OmniMoeForCausalLM(BEIT3.config_of(plain)).eval()
    plan, theirs = BEIT3.plan(model), dict(peer.state_dict())
    assert set(plan.published) == set(theirs)
    held = model.state_dict()
    with torch.no_grad():
        for piece in plan.pieces:
            piece.place(held[piece.ours]).copy_(piece.change.into(theirs[piece.published]))
    return model


def for_ours(model: OmniMoeForCausalLM, pixels: Tensor | None, words: Tensor | None, padding: Tensor | None) -> dict:
    """The arguments of our model for a batch of the reference.

    Args:
        model: ours.
        pixels: ``(B, 3, H, W)``, or None.
        words: ``(B, T)`` ids, or None.
        padding: ``(B, T)`` bool, True at padding.
    """
    given: dict[str, Any] = {}
    parts, masks = [], []
    if pixels is not None:
        vision = model.config.modalities[VISION]
        parts.append(torch.full((len(pixels), vision.num_tokens), vision.placeholder_id))
        masks.append(torch.ones_like(parts[0]))
        given["features"] = {"vision": model.model.modalities["vision"].encoder.patches(pixels)}
    if words is not None:
        parts.append(words)
        masks.append(torch.ones_like(words) if padding is None else (~padding).long())
    given["input_ids"] = torch.cat(parts, dim=1)
    if padding is not None:
        given["attention_mask"] = torch.cat(masks, dim=1)
    return given


def side_by_side(*, width: int = 512, layers: int = 8, length: int = 64) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Calls of ours and of the reference on the same pictures and words, for timing them.

    Args:
        width: of the stream.
        layers: of the encoder.
        length: words of a text.
    """
    plain = published(width=width, layers=layers, heads=width // 64, inner=4 * width, vocab=1000)
    plain |= {"img_size": 96, "patch_size": 16, "max_source_positions": length + 2}
    peer = make_peer(plain, noise=0.02)
    model = equal_weights(peer, plain)
    pixels, words = torch.randn(4, 3, 96, 96), torch.randint(3, 900, (4, length))
    ours = for_ours(model, pixels, words, None)
    return lambda: model.model(**ours), lambda: peer(textual_tokens=words, visual_tokens=pixels)
