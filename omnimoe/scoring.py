"""From predictions to losses: unreduced, labelled by modality, then one scalar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.inputs import InputError, check_ids, check_tensor
from omnimoe.modalities import Tokens
from omnimoe.model_config import OmniMoeConfig
from omnimoe.routers import Routing


@dataclass
class Scores:
    """Collects unreduced losses, labelled by what was predicted, and reduces them to one.

    Args:
        config: of the model.
        modality_ids_of: the modality of each id, ``(B, T)`` to ``(B, T)``.
        losses: mean loss of each modality.
        counts: how many positions each is over.
        token_losses: ``(B, T)`` float32.
    """

    config: OmniMoeConfig
    modality_ids_of: Callable[[Tensor], Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    token_losses: Tensor | None = None
    _terms: list[tuple[str, Tensor]] = field(default_factory=list)

    def add_tokens(
        self,
        logits: Tensor,
        labels: Tensor,
        segment_ids: Tensor | None,
        valid: Tensor | None,
        *,
        name: str = "labels",
    ) -> None:
        """Scores the next token everywhere that a label stands.

        Args:
            logits: ``(B, T, V)``.
            labels: ``(B, T)``, the ids themselves, or what each position predicts under the name ``shift_labels``.
            segment_ids: ``(B, T)``, read for the ids themselves alone.
            valid: ``(B·T,)``.
            name: ``"labels"`` or ``"shift_labels"``.
        """
        check_tensor(name, labels, lambda: str(tuple(logits.shape[:2])))
        if logits.shape[:2] != labels.shape:
            raise InputError(f"{name} must be {tuple(logits.shape[:2])}, as the logits, got {tuple(labels.shape)}")
        shape = (labels.shape[0], labels.shape[1])
        named = labels.masked_fill(labels == -100, 0)
        check_ids(name, named, shape, 0, self.config.vocab_size, "-100 marks what is not predicted")
        wanted = labels.long()
        real = None if valid is None else valid.view(shape)
        if name == "labels":
            # what follows is predicted; after the last position nothing does
            wanted = F.pad(wanted[:, 1:], (0, 1), value=-100)
            if segment_ids is not None:
                inside = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
                wanted = wanted.masked_fill(~F.pad(inside, (0, 1)), -100)
            if real is not None:
                wanted = wanted.masked_fill(~F.pad(real[:, 1:], (0, 1)), -100)
        if real is not None:
            wanted = wanted.masked_fill(~real, -100)  # a padding position predicts nothing either
        # every position is scored, the last ones too: a slice of the logits would be copied, and filled up in backward
        each = Tokens.loss(logits.flatten(0, 1), wanted.flatten()).view(shape)
        self.token_losses = each if name == "shift_labels" else F.pad(each[:, :-1], (1, 0))
        counted = wanted != -100
        predicted = self.modality_ids_of(wanted.clamp_min(0))
        for modality_id, modality in enumerate(self.config.modalities):
            if modality.is_discrete:
                chosen = counted & (predicted == modality_id)
                self._add(modality.name, (each * chosen).sum(), chosen.sum())

    def add_rows(self, name: str, each: Tensor, counted: Tensor | None = None) -> None:
        """Takes the losses ``(n,)`` of a continuous modality, those of ``counted (n,)`` alone."""
        if counted is None:
            counted = torch.ones_like(each, dtype=torch.bool)
        self._add(name, torch.where(counted, each, 0).sum(), counted.sum())

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        self.losses[name] = total / count.clamp_min(1)
        self.counts[name] = count
        self._terms.append((name, total))

    @property
    def num_tokens(self) -> Tensor | int:
        """How many tokens are predicted."""
        discrete = {modality.name for modality in self.config.modalities if modality.is_discrete}
        return sum(self.counts[name] for name, _ in self._terms if name in discrete)

    def total(self, hidden: Tensor) -> Tensor:
        """One scalar: tokens share one mean, continuous modalities have their own."""
        weights = {modality.name: modality.loss_weight for modality in self.config.modalities}
        discrete = {modality.name for modality in self.config.modalities if modality.is_discrete}
        loss = 0.0 * hidden.float().sum()
        count = torch.zeros((), device=hidden.device) + self.num_tokens
        for name, total in self._terms:
            loss = loss + weights[name] * total / (count if name in discrete else self.counts[name]).clamp_min(1)
        return loss


def aux_loss_of(routings: tuple[Routing | None, ...]) -> Tensor | None:
    """The balance losses of all routers, times their coefficients, averaged over routers; None without any."""
    routed = [routing for routing in routings if routing is not None]
    terms = [loss for routing in routed for loss in routing.losses.values()]
    return torch.stack(terms).sum() / len(routed) if terms else None
