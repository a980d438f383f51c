"""One optimizer step: forwards and backwards, what they measured, and the checks before the weights move.

What a step measures stays on the device until its gradients are there, and is read back once: the forwards wait for
nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnimoe.inputs import check_batch
from omnimoe.layers import BaseAttention
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.routers import Router, join_routings, router_faults
from omnimoe.train.data import Batch, add_noise
from omnimoe.train.errors import RouterError, TrainingError
from omnimoe.train.optim import learning_rate
from omnimoe.train.processes import Processes
from omnimoe.train.settings import TrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step measured, over all its forwards and processes.

    Args:
        loss: mean over forwards.
        learning_rate: that was used.
        gradient_norm: before clipping.
        sums: summed loss of each modality, in nats.
        counts: how many positions each is over.
        is_last: whether some process asked to stop after this step.
    """

    loss: float
    learning_rate: float
    gradient_norm: float
    sums: dict[str, float]
    counts: dict[str, float]
    is_last: bool = False

    def numbers(self) -> dict[str, float]:
        """What the log keeps of it."""
        return {"loss": self.loss, "learning_rate": self.learning_rate, "gradient_norm": self.gradient_norm}


class Stepper:
    """Takes the steps of a run.

    Args:
        model: what is trained.
        optimizer: over its parameters.
        settings: of the run.
        processes: that share it.
    """

    def __init__(
        self,
        model: OmniMoeForCausalLM,
        optimizer: torch.optim.Optimizer,
        settings: TrainSettings,
        processes: Processes,
    ) -> None:
        self.model, self.optimizer, self.settings, self.processes = model, optimizer, settings, processes
        self.device = next(model.parameters()).device
        self._parallel = processes.wrap(model)
        routers = [module for module in model.modules() if isinstance(module, Router)]
        self._adapted = [held for router in routers for held in router.buffers() if held.is_floating_point()]

    def take(self, batches: Iterator[Batch], step: int, *, stop: bool = False) -> StepResult:
        """Step number ``step``, counted from 0.

        Args:
            batches: of all processes together; this one takes its rows.
            step: decides the learning rate.
            stop: ask all processes to stop after this step.

        Returns:
            What was measured, the same in every process.

        Raises:
            RouterError: if a router's answer is not finite and ``settings.router_nan`` says to raise.
            TrainingError: if the loss or its gradient is not finite. In both cases the weights are those before the
                step, and there are no gradients.
        """
        settings, rate = self.settings, learning_rate(step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        measured, routed, names = [], [], []
        for number in range(settings.accumulate):
            out = self._forward(next(batches))
            names = list(out.losses)
            with self._waiting(number + 1 < settings.accumulate):
                (out.loss / settings.accumulate).backward()
            measured.append(self._measure(out, stop))
            routed.append(out.routings)
        norm = nn.utils.clip_grad_norm_(list(self.model.parameters()), settings.clip or math.inf)
        total = self.processes.sum(torch.stack(measured).sum(0))
        loss, stops, *rest = torch.cat((total, norm.double().reshape(1))).tolist()
        sums, counts, rest = rest[: len(names)], rest[len(names) : 2 * len(names)], rest[2 * len(names) :]
        result = StepResult(
            loss=loss / (settings.accumulate * self.processes.world_size),
            learning_rate=rate,
            gradient_norm=rest.pop(),
            sums=dict(zip(names, sums, strict=True)),
            counts=dict(zip(names, counts, strict=True)),
            is_last=stops > 0,
        )
        try:
            self._check_routers(rest, step + 1)
            _check_finite(result, step + 1)
        except TrainingError:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_routers(join_routings(routed))
        self.processes.average(self._adapted)
        return result

    def _forward(self, batch: Batch) -> Any:
        batch = add_noise(self.processes.share(batch), self.model.config, self.settings.noise_shares)
        # here, before they are on a device, ids cost nothing to look at
        ids, kinds, segments = batch["input_ids"], batch["modality_ids"], batch["segment_ids"]
        check_batch(self.model.config, ids, None, kinds, None, segments)
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self._parallel(**batch)

    def _waiting(self, more: bool):
        """Gradients travel once a step, with its last backward."""
        return self._parallel.no_sync() if more and self._parallel is not self.model else nullcontext()

    @torch.no_grad()
    def _measure(self, out: Any, stop: bool) -> Tensor:
        """Loss, wish to stop, sums, counts and routers' faults, ``(2 + 2 * names + L * M,)`` float64 on the device."""
        counts = torch.stack([out.counts[name].double() for name in out.losses])
        sums = torch.stack([loss.double() for loss in out.losses.values()]) * counts
        parts = [out.loss.double().view(1), out.loss.new_full((1,), float(stop), dtype=torch.float64), sums, counts]
        if self.settings.router_nan != "off":
            faults = router_faults(out.routings, out.rows, len(self.model.config.modalities))
            parts.append(faults.flatten().to(self.device, torch.float64))
        return torch.cat(parts)

    def _check_routers(self, faults: list[float], step: int) -> None:
        if not any(faults):
            return
        names = self.model.config.modality_names
        first = next(index for index, count in enumerate(faults) if count)
        place = first // len(names)
        found = dict(zip(names, faults[place * len(names) : (place + 1) * len(names)], strict=True))
        told = ", ".join(f"{name} ({count:.0f} rows)" for name, count in found.items() if count)
        layer, part = self.model.model.backbone.parts[place]
        weights = [held for router in part.modules() if isinstance(router, Router) for held in router.parameters()]
        own = all(bool(held.isfinite().all()) for held in weights)
        cause = "its weights are finite, so what reaches it is not" if own else "its own weights are not finite"
        where = f"the attention of layer {layer}" if isinstance(part, BaseAttention) else f"layer {layer}"
        message = f"the router of {where} is not finite at step {step} for {told}; {cause}"
        if self.settings.router_nan == "warn":
            logger.warning("%s", message)
            return
        raise RouterError(
            f"{message}. Lower the learning rate, lengthen the warm-up, clip harder or raise the router's z_loss_coef; "
            "router_nan='warn' only says it"
        )


def _check_finite(result: StepResult, step: int) -> None:
    if math.isfinite(result.loss) and math.isfinite(result.gradient_norm):
        return
    bad = sorted(name for name, value in result.sums.items() if not math.isfinite(value))
    if math.isfinite(result.loss):
        told, where = f"the norm of the gradient is {result.gradient_norm}", f"loss {result.loss:.3f}"
    else:
        told, where = f"the loss is {result.loss}", "balance losses"
    raise TrainingError(
        f"{told} at step {step} ({', '.join(bad) or where}); lower the learning rate {result.learning_rate:.2g}, "
        "lengthen the warm-up or clip harder"
    )
