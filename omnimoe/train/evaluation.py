"""Loss of each modality on held-out batches, and what auxiliary routers foretell of their routing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from omnimoe.auxiliary import measure_auxiliary_routers, set_auxiliary_thresholds
from omnimoe.layers.masks import is_causal_rule
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.routers import AuxiliaryRouter
from omnimoe.train.data import Batch
from omnimoe.train.processes import Processes


@torch.no_grad()
def evaluate(
    model: OmniMoeForCausalLM,
    batches: Iterable[Batch],
    *,
    precision: str = "fp32",
    device: torch.device | None = None,
    processes: Processes | None = None,
    is_causal: bool = False,
) -> dict[str, float]:
    """Mean next-token loss of each modality and over all tokens.

    Args:
        model: the model; its training mode is put back as it was.
        batches: as the corpus gives them, with labels.
        precision: ``"bf16"`` for autocast.
        device: where the model is; read off it where None.
        processes: that share the rows of each batch; this one alone where None.
        is_causal: route every token by itself, as generation does, where routers otherwise choose among rows.

    Returns:
        Modality to nats a predicted token, and ``"all"``; a modality that was not predicted is left out.
    """
    device, processes = device or next(model.parameters()).device, processes or Processes()
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {}
    counts: dict[str, float] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in batches:
            given = {name: value.to(device) for name, value in processes.share(batch).items()}
            out = model(**given, use_cache=True) if is_causal else model(**given)
            for name, loss in out.losses.items():
                count = float(out.counts[name])
                totals[name] = totals.get(name, 0.0) + float(loss) * count
                counts[name] = counts.get(name, 0.0) + count
    model.train(was_training)
    sums = torch.tensor([*totals.values(), *counts.values()], dtype=torch.float64, device=device)
    found = processes.sum(sums).tolist()
    totals, counts = (dict(zip(totals, part, strict=True)) for part in (found[: len(totals)], found[len(totals) :]))
    losses = {name: totals[name] / counts[name] for name in totals if counts[name]}
    if losses:
        losses["all"] = sum(totals.values()) / sum(counts.values())
    return losses


def has_causal_twin(config: OmniMoeConfig) -> bool:
    """Whether a model looks ahead, and can be asked not to."""
    can = is_causal_rule(config.mask) and all(block.has_causal_form for block in config.blocks)
    return can and not config.is_causal


FORETOLD = ("accuracy", "precision", "recall", "taken", "wanted")
"""What :func:`foretold` gives."""


def foretold(model: OmniMoeForCausalLM, batches: Iterable[Batch], *, precision: str = "fp32") -> dict[str, float]:
    """How well auxiliary routers foretell what main ones choose, as means over them; on the rows of this process alone.

    Args:
        model: with auxiliary routers; its training mode is put back as it was.
        batches: as the corpus gives them.
        precision: ``"bf16"`` for autocast.
    """
    found = measure_auxiliary_routers(model, batches, precision=precision)
    return {name: sum(getattr(one, name) for one in found) / max(1, len(found)) for name in FORETOLD}


def set_thresholds(
    model: OmniMoeForCausalLM, batches: Iterator[Batch], processes: Processes, *, precision: str = "fp32", num: int = 8
) -> None:
    """Sets the thresholds of auxiliary routers on the next batches; of several processes, to the mean of theirs.

    Args:
        model: with auxiliary routers, changed in place.
        batches: of all processes together.
        processes: that share them.
        precision: ``"bf16"`` for autocast.
        num: batches to take.
    """
    own = [processes.share(batch) for batch in islice(batches, num)]
    set_auxiliary_thresholds(model, own, precision=precision)
    outers = [module.outer for module in model.modules() if isinstance(module, AuxiliaryRouter)]
    processes.average([outer.bias.data for outer in outers if outer.bias is not None])
