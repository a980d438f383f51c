"""Random weights for a model and the same by their published names, and what a published folder of them is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnimoe.convert import Converter
from omnimoe.model import OmniMoeForCausalLM


def random_model(converter: Converter, plain: dict[str, Any], *, noise: float = 0.2) -> OmniMoeForCausalLM:
    """A model of a published config whose every weight is random, norms, biases and tables too."""
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(converter.config_of(plain)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def published_of(
    converter: Converter, model: OmniMoeForCausalLM, held: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a published file of the model would hold; or the same of other tensors by our names, such as gradients."""
    held = model.state_dict() if held is None else held
    found: dict[str, Tensor] = {}
    for name, pieces in converter.plan(model).by_published().items():
        parts = [piece.change.back(piece.place(held[piece.ours])) for piece in pieces]
        found[name] = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    return found


def gradients_of(converter: Converter, model: OmniMoeForCausalLM) -> dict[str, Tensor]:
    """The gradient of every published tensor."""
    return published_of(converter, model, {name: held.grad for name, held in model.named_parameters()})


def write_folder(folder: Path, plain: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A published folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(plain))
    save_file({name: held.contiguous() for name, held in weights.items()}, folder / "model.safetensors")
    return folder


def close(found: Tensor, wanted: Tensor, bound: float = 1e-5) -> None:
    """Equal within a relative error of the whole."""
    assert found.shape == wanted.shape
    assert bool(wanted.isfinite().all())
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert error < bound, error


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder."""
    return {name: held for file in sorted(folder.glob("*.safetensors")) for name, held in load_file(file).items()}


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
