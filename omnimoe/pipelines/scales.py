"""The scales of a robot's states and actions, from wherever a checkpoint of pi0 keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimoe.checkpoint import CheckpointError, read_json
from omnimoe.convert.files import Weights, stored_names
from omnimoe.zoo.pi0.convert import NORMALIZER, OWN_NORMALIZER

_PLACES = {
    "state": ("normalize_inputs.buffer_observation_state", "observation.state"),
    "action": ("normalize_targets.buffer_action", "unnormalize_outputs.buffer_action", "action"),
}
"""Where statistics lie: earlier files of lerobot have them among the weights, later ones apart. The last counts."""
_PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class Scale:
    """What the numbers of a data set were divided by: ``(x - mean) / std``.

    Args:
        mean: ``(n,)``.
        std: ``(n,)``.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float32))
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape or not bool((self.std >= 0).all()):
            raise ValueError(
                f"mean and std must be (n,) each and std not negative, got {tuple(self.mean.shape)} and "
                f"{tuple(self.std.shape)}"
            )

    def into(self, x: Tensor) -> Tensor:
        """Numbers of the data set ``(..., n)`` to those that the model knows."""
        return (x - self.mean) / (self.std + 1e-8)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`into`; columns past the n-th, which the data set has not, are left out."""
        return x[..., : len(self.mean)] * (self.std + 1e-8) + self.mean


def read_scales(folder: Path) -> dict[str, Scale]:
    """The scales ``state`` and ``action`` of a checkpoint, from lerobot's normalizer, from among the weights of its
    earlier files, or from transformers' processor; those that are there.

    Raises:
        CheckpointError: if a file of them is malformed, or the numbers are not scaled by mean and spread.
    """
    found: dict[str, Scale] = {}
    try:
        kinds = _normalisations(folder)
        for file in _files(folder):
            with Weights(folder, {"": file}) as held:
                for name, places in _PLACES.items():
                    for place in places:
                        found |= _scale(held, name, place, kinds.get(name.upper(), "MEAN_STD"))
        if (folder / _PROCESSOR).is_file():
            plain = read_json(folder / _PROCESSOR, CheckpointError)
            for name, key in (("state", "state"), ("action", "actions")):
                mean, std = plain.get(f"{key}_mean"), plain.get(f"{key}_std")
                if mean is not None and std is not None:
                    found[name] = Scale(mean, std)
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the scales of states and actions in {folder} are malformed: {error}") from error
    return found


def _files(folder: Path) -> Iterator[str]:
    """Files with statistics, earlier ones first."""
    known = tuple(f"{place}." for places in _PLACES.values() for place in places)
    if any(name.startswith(known) for name in stored_names(folder)):
        yield "model.safetensors"
    yield from (path.name for path in (folder / OWN_NORMALIZER, *sorted(folder.glob(NORMALIZER))) if path.is_file())


def _scale(held: Weights, name: str, place: str, kind: str) -> dict[str, Scale]:
    """What a file tells of states or actions; nothing where it has no statistics, or they were never set."""
    if kind == "IDENTITY" or not any(key.startswith(f"{place}.") for key in held.shapes):
        return {}
    if kind != "MEAN_STD":
        raise CheckpointError(
            f"this checkpoint normalises {name} by {kind!r}, and only MEAN_STD and IDENTITY are known here: load the "
            "model with from_pretrained, make Pi0(model, tokenizer), and scale the numbers yourself"
        )
    if not {f"{place}.mean", f"{place}.std"} <= set(held.shapes):
        raise CheckpointError(f"{place} has no mean and std, by which this checkpoint says it normalises {name}")
    mean, std = held.read(f"{place}.mean").flatten(), held.read(f"{place}.std").flatten()
    # lerobot fills with infinity what no data set gave
    return {} if bool(mean.isinf().all() and std.isinf().all()) else {name: Scale(mean, std)}


def _normalisations(folder: Path) -> dict[str, str]:
    """How each kind of numbers is normalised, by lerobot's words, as far as a checkpoint says it."""
    found: dict[str, str] = {}
    if (folder / "config.json").is_file():
        plain: Mapping[str, Any] = read_json(folder / "config.json", CheckpointError)
        # a folder of ours remembers the published config
        plain = ((plain.get("published") or {}).get("files") or {}).get("config.json", plain)
        found |= plain.get("normalization_mapping") or {}
    if (folder / "policy_preprocessor.json").is_file():
        for step in read_json(folder / "policy_preprocessor.json", CheckpointError).get("steps") or ():
            found |= (step.get("config") or {}).get("norm_map") or {}
    return found


__all__ = ["Scale", "read_scales"]
