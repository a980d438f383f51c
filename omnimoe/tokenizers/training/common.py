"""What the trainings share: reading a corpus folder, the loop with averaged weights, the command line."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


def indices_by_split(corpus: Path, field: str) -> dict[str, list[int]]:
    """Indices of the pictures or clips of each split.

    Args:
        corpus: folder with ``rows.jsonl``, one object a line with ``split`` and the index ``field`` (-1 or null: none).
        field: ``"image"`` or ``"audio"``.

    Raises:
        ValueError: if the file has no such rows, or if an item lies in two splits, which would flatter the figures.
    """
    split_of: dict[int, str] = {}
    other: dict[int, str] = {}
    with open(corpus / "rows.jsonl", encoding="utf-8") as rows:
        for line in rows:
            row = json.loads(line)
            index = row.get(field)
            if index is None or index < 0:
                continue
            table = split_of if row["split"] in SPLITS else other
            if table.setdefault(index, row["split"]) != row["split"]:
                raise ValueError(f"{field} {index} is in {table[index]} and in {row['split']}; split by item first")
    # Held-out drawings of a known concept share its clip, which is then no held-out clip.
    split_of = {**other, **split_of}
    by_split: dict[str, list[int]] = {split: [] for split in (*SPLITS, *sorted(set(other.values())))}
    for index, split in sorted(split_of.items()):
        by_split[split].append(index)
    if not by_split["train"]:
        raise ValueError(f"{corpus / 'rows.jsonl'} names no {field} of the train split")
    return by_split


def cosine_rate(progress: float, *, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Factor of the learning rate at ``progress`` in 0..1: a short rise, then half a cosine down to ``floor``."""
    if progress < warmup:
        return progress / warmup + 1e-3
    fall = min(1.0, (progress - warmup) / (1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fall))


class AveragedWeights:
    """Exponential moving average of a network's parameters; :attr:`network` holds it, for evaluation and saving."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self._count = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes in the parameters after one step."""
        self._count += 1
        # A plain mean at first: the random start must not weigh on a short run.
        decay = min(self.decay, self._count / (self._count + 10))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)


def epochs(indices: list[int], batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of shuffled ``indices`` without end, each pass in a new order; the rest of a pass is dropped."""
    if len(indices) < batch_size:
        raise ValueError(f"{len(indices)} items do not fill one batch of {batch_size}; lower --batch-size")
    pool = torch.tensor(indices)
    while True:
        order = pool[torch.randperm(len(pool), generator=generator)]
        yield from order[: len(order) // batch_size * batch_size].split(batch_size)


class Clock:
    """How far a training is: by steps, or by minutes where those run out first.

    Args:
        steps: steps of the whole schedule; runs of the same number of steps and seed give the same weights.
        minutes: wall-clock limit, or ``None``.
    """

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.minutes = steps, minutes
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def progress(self, step: int) -> float:
        """Share of the schedule that lies behind, 1 at its end."""
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(step / self.steps, by_time)


def fit(
    network: nn.Module,
    batches: Iterator[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    options: argparse.Namespace,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> nn.Module:
    """Trains until the steps or the minutes run out: AdamW, a cosine, clipped gradients, averaged weights.

    Args:
        network: changed in place.
        batches: what ``loss_of`` takes, without end.
        loss_of: a batch to a loss ``()``.
        options: of :func:`parser`.
        evaluate: figures of the averaged network, logged every 500 steps.

    Returns:
        The averaged network, in evaluation mode.
    """
    average = AveragedWeights(network, decay=0.998)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    logger.info("%.2f M parameters", parameters / 1e6)
    clock, recent, step = Clock(options.steps, options.minutes), [], 0
    while (progress := clock.progress(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * cosine_rate(progress)
        loss = loss_of(next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update(network)
        recent.append(loss.item())
        step += 1
        if step % 100 == 0:
            shown = evaluate(average.network) if step % 500 == 0 else {}
            extra = "".join(f"  val {name} {value:.3f}" for name, value in shown.items())
            logger.info("step %d  %.0f s  loss %.4f%s", step, clock.seconds, sum(recent) / len(recent), extra)
            recent.clear()
    logger.info("%d steps, %.0f s", step, clock.seconds)
    return average.network


def parser(description: str, *, steps: int, batch_size: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options every training has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--corpus", type=Path, required=True, help="folder with rows.jsonl and the arrays")
    options.add_argument("--out", type=Path, required=True, help="file to write, ending in .safetensors")
    options.add_argument("--steps", type=int, default=steps, help="steps of the schedule (%(default)s)")
    options.add_argument("--minutes", type=float, help="wall-clock limit, which shortens the schedule (none)")
    options.add_argument("--batch-size", type=int, default=batch_size, help="items a step (%(default)s)")
    options.add_argument("--learning-rate", type=float, default=learning_rate, help="peak rate of AdamW (%(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    options.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    return options


def prepare(seed: int) -> None:
    """Seeds every generator and sends the log to standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    random.seed(seed)
    torch.manual_seed(seed)
