"""What a step needs in memory, and what to say when there is not enough."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimoe.checkpoint.memory import available_memory, in_units
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.train.data import Batch
from omnimoe.train.errors import OutOfMemoryError
from omnimoe.train.settings import TrainSettings

PROBE = 64
"""Positions of a sequence from which the memory of activations is measured."""

_COMPLAINTS = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a training step holds at its peak, about, in bytes.

    Args:
        weights: parameters and buffers.
        gradients: of the trainable ones.
        optimizer: AdamW's two moments.
        activations: what one forward keeps for its backward; None where it could not be measured.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


def estimate_memory(model: OmniMoeForCausalLM, settings: TrainSettings, batch: Batch) -> MemoryEstimate:
    """What a training step needs, about: activations are measured on a few tokens, and grow with their number.

    Args:
        model: the model, where it is.
        settings: of the run.
        batch: the part of a batch that one process takes.

    Example:
        >>> from omnimoe import load
        >>> from omnimoe.data import Corpus
        >>> from omnimoe.train import TrainSettings, training_batches
        >>> model, settings = load("dense_nano", seed=0), TrainSettings(precision="fp32")
        >>> batch = next(training_batches(model.config, settings, Corpus.load("p")))
        >>> found = estimate_memory(model, settings, batch)
        >>> found.optimizer == 2 * found.gradients
        True
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(_size(parameter) for parameter in trainable)
    weights = sum(_size(held) for held in (*model.parameters(), *model.buffers()))
    try:
        activations = _activations(model, settings, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        activations = None
    return MemoryEstimate(weights=weights, gradients=gradients, optimizer=2 * gradients, activations=activations)


def _activations(model: OmniMoeForCausalLM, settings: TrainSettings, batch: Batch) -> int:
    device = next(model.parameters()).device
    probe = {name: value[:1, :PROBE].to(device) for name, value in batch.items()}
    own = {held.untyped_storage().data_ptr() for held in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Any:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        # there is no backward, and a graph that is handed its own outputs would never be freed
        torch.autograd.graph.saved_tensors_hooks(keep, keep),
        torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"),
    ):
        out = model(**probe)
    del out
    ids = batch["input_ids"]
    return sum(kept.values()) * ids.numel() // probe["input_ids"].numel()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _COMPLAINTS)


@contextmanager
def explain_out_of_memory(
    model: OmniMoeForCausalLM, settings: TrainSettings, next_batch: Callable[[], Batch], *, where: str
) -> Iterator[None]:
    """Turns running out of memory into an error with an estimate and the settings that help, and lets go of the step.

    Args:
        model: the model.
        settings: of the run.
        next_batch: gives a batch like the one that failed, as this process takes it.
        where: what was under way, for the message.

    Raises:
        OutOfMemoryError: no gradient and no activation of what was under way is kept, and the model can be used.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # the frames of the failed step hold its activations as long as somebody holds the error
        traceback.clear_frames(error.__traceback__)
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batch = next_batch()
        found = estimate_memory(model, settings, batch)
        told = str(error).strip().partition("\n")[0]
        raise OutOfMemoryError(f"out of memory {where}: {_advice(found, model, settings, batch)} ({told})") from error


def _advice(found: MemoryEstimate, model: OmniMoeForCausalLM, settings: TrainSettings, batch: Batch) -> str:
    rows, length = batch["input_ids"].shape[:2]
    parts = {"weights": found.weights, "gradients": found.gradients, "AdamW's moments": found.optimizer}
    if found.activations is not None:
        parts[f"activations of {rows} x {length} tokens"] = found.activations
    told = ", ".join(f"{in_units(size)} {name}" for name, size in parts.items())
    device = next(model.parameters()).device
    free = _free(device)
    left = "" if free is None else f"; with the step given up, {in_units(free)} are free on {device}"
    knobs = []
    if rows > 1:
        half = settings.batch_size // 2
        knobs.append(
            f"batch_size={half} with accumulate={2 * settings.accumulate} makes the same step of smaller parts"
        )
    if not settings.checkpoint_activations:
        knobs.append("checkpoint_activations=True recomputes them")
    knobs.append("a shorter sequence_length")
    if settings.precision == "fp32":
        knobs.append("precision='bf16' halves most of them")
    return f"a step needs about {in_units(found.total)} ({told}){left}; what helps: {'; '.join(knobs)}"


def _free(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _size(held: Tensor) -> int:
    return held.numel() * held.element_size()
