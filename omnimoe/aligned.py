"""Vectors by which inputs of several modalities are compared, as two-tower models are trained with a contrast."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.encode import Encodes
from omnimoe.inputs import InputError
from omnimoe.model_config import OmniMoeConfig


class Aligned(nn.Module):
    """A linear map for each modality and the logarithm of what their products are multiplied by.

    Args:
        config: of the model, whose ``aligned_size`` is the width of a vector.

    Source: https://arxiv.org/abs/2103.00020.
    """

    initial = {"weight": "normal", "bias": 0.0, "logit_scale": math.log(1 / 0.07)}

    def __init__(self, config: OmniMoeConfig) -> None:
        super().__init__()
        shape = len(config.modalities), config.aligned_size, config.hidden_size
        self.weight = nn.Parameter(torch.empty(shape).normal_(std=config.initializer_range))
        self.bias = nn.Parameter(torch.zeros(shape[:2])) if config.aligned_bias else None
        self.logit_scale = nn.Parameter(torch.tensor(self.initial["logit_scale"]))

    def forward(self, x: Tensor, modality: int) -> Tensor:
        """``(B, D)`` to unit vectors ``(B, C)``."""
        bias = None if self.bias is None else self.bias[modality]
        return F.normalize(F.linear(x, self.weight[modality], bias), dim=-1)


class Pooled(nn.Module):
    """A head over labels of a whole sequence, behind a layer that reads its first row.

    Args:
        hidden_size: D.
        num_labels: L.

    Source: https://arxiv.org/abs/1810.04805.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.score = nn.Linear(hidden_size, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, L)``."""
        return self.score(torch.tanh(self.dense(x)))


class Aligns(Encodes):
    """``align`` of a model with an :class:`Aligned`, ``pool`` of one with a :class:`Pooled`."""

    aligned: Aligned | None
    pooled: Pooled | None

    def align(self, modality: str, x: Any, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Unit vectors of inputs of one modality, each by itself.

        Args:
            modality: its name.
            x: as for :meth:`encode`.
            attention_mask: ``(B, T)``, 0 for padding.
            inputs: other arguments of ``forward``.

        Returns:
            ``(B, C)``, of the first row of each input that is no padding.

        Raises:
            InputError: if the model has no such maps, or as :meth:`encode`.
        """
        if self.aligned is None:
            raise InputError("this model has no maps that align modalities: its config has aligned_size 0")
        hidden = self.encode(modality, x, attention_mask=attention_mask, **inputs)
        return self.aligned(_first(hidden, attention_mask), self.config.modality_names.index(modality))

    def pool(self, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Scores of the labels of whole sequences: of a picture and a text whether they go together.

        Args:
            attention_mask: ``(B, T)``, 0 for padding.
            inputs: other arguments of ``forward``.

        Returns:
            ``(B, L)``, by the first row of each sequence that is no padding.

        Raises:
            InputError: if the model has no such head.
        """
        if self.pooled is None:
            raise InputError("this model has no head over whole sequences: its config has pooled_labels 0")
        hidden = self.base_model(attention_mask=attention_mask, **inputs).last_hidden_state
        return self.pooled(_first(hidden, attention_mask))

    def contrast(self, first: Tensor, second: Tensor) -> Tensor:
        """The symmetric cross-entropy of vectors that belong together by their place, ``(B, C)`` twice.

        Returns:
            A scalar; the mean over both directions.

        Raises:
            InputError: if the model has no such maps, or the shapes differ.
        """
        if self.aligned is None:
            raise InputError("this model has no maps that align modalities: its config has aligned_size 0")
        if first.shape != second.shape:
            raise InputError(f"vectors must come in pairs, got {tuple(first.shape)} and {tuple(second.shape)}")
        scores = self.aligned.logit_scale.exp() * first.float() @ second.float().t()
        target = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def _first(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``(B, D)``, the first row of each sequence that is no padding."""
    if attention_mask is None:
        return hidden[:, 0]
    first = attention_mask.to(hidden.device).bool().int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


__all__ = ["Aligned", "Aligns", "Pooled"]
