"""What became of a seed: weight by weight, what can be said of the function, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.upcycle.gates import CHANGED, EXACT
from omnimoe.upcycle.sources import Change
from omnimoe.upcycle.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class UpcycledWeight:
    """A weight of the new model.

    Args:
        name: of it.
        source: the seed's weight that it starts as; None for a new one.
        copies: the copies of the seed's weight, one for each here; None for all of it as it was.
        numel: numbers in it.
    """

    name: str
    source: str | None
    copies: tuple[int, ...] | None
    numel: int

    @property
    def state(self) -> str:
        """``"new"``, ``"copied"`` (some copy of the seed's is there several times) or ``"kept"``."""
        if self.source is None:
            return "new"
        return "copied" if self.copies is not None and len(set(self.copies)) < len(self.copies) else "kept"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seed and new model on one batch, in rows of the vocabulary that the seed has.

    Args:
        difference: largest absolute difference of logits.
        loss: the seed's mean next-token loss on the batch, in nats.
        new_loss: the new model's, its softmax over the seed's rows.
        open_loss: the new model's, over all rows.
        new_share: mean probability of the rows that are new.
    """

    difference: float
    loss: float
    new_loss: float
    open_loss: float
    new_share: float


@dataclass(frozen=True, kw_only=True)
class UpcycleReport:
    """What :func:`omnimoe.upcycle` did.

    Args:
        weights: of the new model.
        changes: what can be said of experts that came under a router.
        vocabulary: rows and where they come from.
        num_seed: weights of the seed.
        measured: on the batch that was given, or None.
    """

    weights: tuple[UpcycledWeight, ...]
    changes: tuple[Change, ...]
    vocabulary: Vocabulary
    num_seed: int
    measured: Measured | None = None

    @property
    def is_preserved(self) -> bool:
        """Whether the new model gives what the seed gave, for what the seed took, up to rounding."""
        return all(change.function == EXACT for change in self.changes)

    @property
    def complaint(self) -> str:
        """What is not preserved, in a sentence; empty where all is."""
        odd = [change for change in self.changes if change.function != EXACT]
        if not odd:
            return ""
        kinds = " and ".join(sorted({change.function for change in odd}))
        why = "; ".join(dict.fromkeys(change.why for change in odd))
        return f"the function of the seed is {kinds} in {len(odd)} of its layers' experts: {why}"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each kind of weight, layers together."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for weight in self.weights:
            name = re.sub(r"\blayers\.\d+\.", "layers.*.", weight.name)
            row = found.setdefault(
                (name, weight.state, weight.copies),
                {"weight": name, "state": weight.state, "copies": weight.copies, "tensors": 0, "numbers": 0},
            )
            row["tensors"] += 1
            row["numbers"] += weight.numel
        return list(found.values())

    def __str__(self) -> str:
        total = sum(weight.numel for weight in self.weights)
        fresh = sum(weight.numel for weight in self.weights if weight.state == "new")
        lines = [f"{self.num_seed:,} weights became {total:,}, {fresh:,} of them new"]
        for row in self.rows():
            copies = "" if row["copies"] is None else f" of the seed's copies {', '.join(map(str, row['copies']))}"
            lines.append(f"  {row['state']:<7}{row['weight']} ({row['tensors']}x){copies}")
        if self.vocabulary.num_new:
            moved = f", ids moved up by {self.vocabulary.offset}" if self.vocabulary.offset else ""
            lines.append(f"  {self.vocabulary.num_new:,} new rows of the vocabulary{moved}")
        lines += [f"  {change.function}: {change.where}: {change.why}" for change in self._told()]
        held = self.measured
        if held is not None:
            lines.append(
                f"  measured: logits differ by at most {held.difference:.3g}; loss {held.loss:.6f}, now "
                f"{held.new_loss:.6f} over the seed's rows and {held.open_loss:.6f} over all, of which new ones get "
                f"{held.new_share:.2g}"
            )
        return "\n".join(lines)

    def _told(self) -> list[Change]:
        found: dict[tuple[str, ...], Change] = {}
        for change in self.changes:
            where = re.sub(r"\blayers\.\d+\.", "layers.*.", change.where)
            found.setdefault(
                (where, change.function, change.why), Change(where=where, function=change.function, why=change.why)
            )
        return sorted(found.values(), key=lambda change: change.function != CHANGED)


@torch.no_grad()
def measure(
    seed: OmniMoeForCausalLM, model: OmniMoeForCausalLM, vocabulary: Vocabulary, batch: Mapping[str, Any] | Tensor
) -> Measured:
    """Compares the two on a batch for the seed.

    Args:
        seed: the seed.
        model: the new model.
        vocabulary: the new one.
        batch: ``input_ids (B, T)`` in ids of the seed, or a mapping of what the seed's forward takes.
    """
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    given = {name: held for name, held in given.items() if name != "labels"}
    device, modes = next(seed.parameters()).device, (seed.training, model.training)
    given = {name: held.to(device) if isinstance(held, Tensor) else held for name, held in given.items()}
    ids = given["input_ids"]
    moved = {**given, "input_ids": ids + vocabulary.offset}
    if len(model.config.keys) > 1 and "key_ids" not in given:
        moved["key_ids"] = torch.zeros_like(ids)
    labels = ids if given.get("attention_mask") is None else ids.masked_fill(given["attention_mask"] == 0, -100)
    seed.eval()
    model.eval()
    before, after = seed(**given).logits.float(), model(**moved).logits.float()
    seed.train(modes[0])
    model.train(modes[1])
    rows = torch.arange(before.shape[-1], device=device) + vocabulary.offset
    held = after[..., rows]
    real = (
        torch.ones_like(ids, dtype=torch.bool) if given.get("attention_mask") is None else given["attention_mask"] > 0
    )
    share = -torch.expm1(held.logsumexp(-1) - after.logsumexp(-1))
    moved_labels = labels.where(labels < 0, labels + vocabulary.offset)
    return Measured(
        difference=float((held - before)[real].abs().max()),
        loss=_loss(before, labels),
        new_loss=_loss(held, labels),
        open_loss=_loss(after, moved_labels),
        new_share=float(share[real].mean()),
    )


def _loss(logits: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


__all__ = ["Measured", "UpcycleReport", "UpcycledWeight", "measure"]
