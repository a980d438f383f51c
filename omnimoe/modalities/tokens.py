"""Discrete codes: a range of the one vocabulary. Table and head belong to the model, since they are shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.modalities.base import Modality, register_modality


@register_modality("tokens")
class Tokens(Modality):
    """Text, picture codes, speech units: whatever is predicted by a softmax over the vocabulary."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Modality.Config):
        """A discrete modality."""

        vocab_size: int = 0
        """Rows of the vocabulary that the modality owns."""
        vocab_start: int | None = None
        """First row; None follows the discrete modality before. A later modality's range cuts into an earlier one's."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.vocab_size < 1:
                raise ConfigError(f"modality {self.name!r} needs a vocab_size of at least 1, got {self.vocab_size}")

        @property
        def is_discrete(self) -> bool:
            return True

    def __init__(self, config: Tokens.Config, *, hidden_size: int) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each row.

        Args:
            outputs: ``(n, V)`` logits over the whole vocabulary.
            targets: ``(n,)`` int64, -100 to ignore.

        Returns:
            ``(n,)`` float32, in nats; 0 where ignored.
        """
        return F.cross_entropy(outputs.float(), targets, ignore_index=-100, reduction="none")
