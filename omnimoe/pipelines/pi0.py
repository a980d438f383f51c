"""From what a robot sees, is told and feels to its next actions, by a pi0 checkpoint as it is published.

A sample is the pictures of its cameras, an instruction and a state. What stands before the actions is computed once,
and each step of the flow runs over the actions alone. Samples of one call are worked on together, whatever their
cameras.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from omnimoe.denoise import denoise
from omnimoe.encoders.raw import whole_pictures
from omnimoe.encoders.siglip import Siglip
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.pipelines.base import Loading, Pipeline, noise_of, open_published, register_pipeline
from omnimoe.pipelines.scales import Scale, read_scales
from omnimoe.tokenizers import Tokenizer
from omnimoe.tokenizers.hf_text import HfTextTokenizer
from omnimoe.zoo.pi0.convert import ACTION, NORMALIZER, OWN_NORMALIZER, SEEN, STATE

STEPS = 10
"""Euler steps of a call, as published."""
LONGEST = 48
"""Ids of the longest instruction that the published models were trained with, its begin and end among them."""
WORDS = "google/paligemma-3b-pt-224"
"""Where the tokenizer lies, which checkpoints of pi0 leave out."""


@register_pipeline("pi0")
class Pi0(Pipeline):
    """A model with the tokenizer of its instructions and the scales of a robot.

    Args:
        model: of the family.
        tokenizer: PaliGemma's.
        state: scale of the robot's states; None where they come scaled.
        action: scale of its actions; None leaves them as the model draws them.
    """

    targets = ("action",)

    def __init__(
        self,
        model: OmniMoeForCausalLM,
        tokenizer: Tokenizer,
        *,
        state: Scale | None = None,
        action: Scale | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.state, self.action = state, action
        modalities: dict[str, Any] = {held.name: held for held in model.config.modalities}
        self.encoder: Siglip.Config = modalities["vision"].encoder
        self.num_actions = modalities["action"].num_tokens
        self.num_states = modalities["state"].channels
        self.channels = modalities["action"].channels

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        tokenizer: Tokenizer | str | PathLike[str] | None = None,
        **options: Unpack[Loading],
    ) -> Pi0:
        """A published checkpoint: a folder, an id on the Hub, or a name of the zoo; with the scales of its robot where
        it holds them.

        Args:
            source: as for :func:`omnimoe.from_pretrained`, or a name of the zoo.
            tokenizer: PaliGemma's, or where it lies; where None that of the checkpoint, or :data:`WORDS` where it has
                none.
            options: those of :class:`~omnimoe.pipelines.base.Loading`.

        Raises:
            CheckpointError: if a file is missing, malformed, or does not fit, or the robot's numbers are not scaled by
                mean and spread.
            TokenizerError: if there is no tokenizer.
        """
        folder, load = open_published(source, ("*.json", NORMALIZER, f"{OWN_NORMALIZER}*"), **options)
        if not isinstance(tokenizer, Tokenizer):
            own = folder / "tokenizer.json"
            place = tokenizer if tokenizer is not None else own if own.is_file() else WORDS
            tokenizer = HfTextTokenizer.from_pretrained(place, add_markers=False)
        model = load()  # the files of whose weights may hold the scales
        return cls(model, tokenizer, **read_scales(folder))

    def act(
        self,
        pictures: Sequence[Sequence[Any]],
        instructions: Sequence[str],
        states: Any,
        *,
        steps: int = STEPS,
        seed: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The next actions of each sample.

        Args:
            pictures: of each sample those of its cameras: paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``.
            instructions: of each sample what is to be done.
            states: ``(B, n)``, what the robot feels; scaled where the pipeline has a scale.
            steps: Euler steps of the flow.
            seed: of the noise; sample i has that of ``seed + i`` alone, whatever it is drawn with.
            noise: ``(B, H, A)``, what to start from in place of ``seed``.

        Returns:
            ``(B, H, A)`` float32 on the CPU: H actions in order of time. With a scale they are in the robot's own
            numbers and as many as it has; without, as wide as the model draws them.

        Raises:
            ValueError: if the arguments do not fit each other or the model, or an instruction is too long.
        """
        batch = self.batch(pictures, instructions, states)
        shape = (len(batch["input_ids"]), self.num_actions, self.channels)
        if noise is None:
            noise = torch.stack(noise_of([shape[1:]] * shape[0], seed))
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must be {shape}, a row for each action of each sample, got {tuple(noise.shape)}")
        rows = denoise(self.model, "action", **batch, steps=steps, noise=noise.flatten(0, 1).to(self.model.device))
        actions = rows.float().cpu().view(shape)
        return actions if self.action is None else self.action.back(actions)

    def batch(self, pictures: Sequence[Sequence[Any]], instructions: Sequence[str], states: Any) -> dict[str, Any]:
        """What the model takes for samples, padded in front: ``input_ids``, ``attention_mask`` and the ``features`` of
        pictures and states. For a step of training add ``features["action"]``, ``timesteps`` and ``targets``.

        Args:
            pictures: as for :meth:`act`, and so what follows.
            instructions: what is to be done.
            states: ``(B, n)``.
        """
        if isinstance(instructions, str) or isinstance(pictures, str | PathLike | np.ndarray | Image.Image):
            raise ValueError("pictures and instructions must be lists, one entry for each sample; put one into a list")
        held = torch.as_tensor(np.asarray(states) if not isinstance(states, Tensor) else states, dtype=torch.float32)
        count = len(instructions)
        if not count or len(pictures) != count or held.ndim != 2 or len(held) != count:
            raise ValueError(
                f"there must be pictures, an instruction and a state for each sample, got {len(pictures)} lists of "
                f"pictures, {count} instructions and states {tuple(held.shape)}"
            )
        cells, rows = [], []
        for cameras, instruction in zip(pictures, instructions, strict=True):
            seen = [self._cells(picture) for picture in whole_pictures(_cameras(cameras))]
            cells += seen
            ids = [SEEN] * (self.encoder.max_side**2 * len(seen)) + self._words(instruction)
            rows.append([*ids, STATE, *[ACTION] * self.num_actions])
        length, device = max(map(len, rows)), self.model.device
        features: dict[str, Any] = {"state": self._states(held).unsqueeze(1).to(device)}
        if cells:
            features["vision"] = self.model.model.modalities["vision"].get_encoder().pad(cells)
        padding = self.model.config.pad_token_id or 0
        padded = [[padding] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "features": features,
        }

    def _words(self, instruction: str) -> list[int]:
        words = instruction.strip().replace("_", " ").replace("\n", " ")
        ids = [self.model.config.bos_token_id, *self.tokenizer.encode(f"{words}\n").tolist()]
        if len(ids) > LONGEST:
            raise ValueError(
                f"the instruction {words[:40]!r}... has {len(ids)} tokens, and the model was trained with at most "
                f"{LONGEST}; say it shorter"
            )
        return ids

    def _states(self, states: Tensor) -> Tensor:
        """``(B, n)`` as they come to ``(B, N)``, scaled and filled up with zeros."""
        if self.state is not None:
            if states.shape[1] != len(self.state.mean):
                raise ValueError(
                    f"states must be (B, {len(self.state.mean)}), as their scale is, got {tuple(states.shape)}"
                )
            states = self.state.into(states)
        missing = self.num_states - states.shape[1]
        if missing < 0:
            raise ValueError(f"states must have at most {self.num_states} numbers, got {tuple(states.shape)}")
        return F.pad(states, (0, missing))

    def _cells(self, picture: Image.Image) -> Tensor:
        pixels = on_square(picture, self.encoder.patch_size * self.encoder.max_side)
        return self.model.model.modalities["vision"].get_encoder().cells(pixels)


def on_square(picture: Image.Image, size: int) -> Tensor:
    """A picture in the middle of a black square, ``(size, size, 3)`` in [-1, 1]: scaled without smoothing, as openpi
    and lerobot do.
    """
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).movedim(2, 0) / 255
    tall, wide = pixels.shape[1:]
    ratio = max(tall / size, wide / size)
    shape = max(1, int(tall / ratio)), max(1, int(wide / ratio))
    if shape != (tall, wide):
        pixels = F.interpolate(pixels.unsqueeze(0), size=shape, mode="bilinear", align_corners=False)[0].clamp(0, 1)
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    return F.pad(pixels, (left, size - shape[1] - left, top, size - shape[0] - top)).movedim(0, 2) * 2 - 1


def training_times(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Times of noise ``(count,)`` as the published models were trained with: Beta(1.5, 1), kept off 0."""
    return 0.999 * torch.rand(count, generator=generator) ** (1 / 1.5) + 0.001


def _cameras(given: Any) -> list[Any]:
    """The pictures of a sample; one that stands alone is that of one camera."""
    return list(given) if isinstance(given, list | tuple) else [given]


__all__ = ["LONGEST", "STEPS", "WORDS", "Pi0", "Scale", "on_square", "read_scales", "training_times"]
