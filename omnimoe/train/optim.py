"""AdamW with weight decay on matrices alone, and the cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from omnimoe.freeze import keep_frozen
from omnimoe.train.settings import TrainSettings


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; what is frozen of one stays as it is.

    A bank of norm scales is a matrix in shape only, so what decays is told by name: norms, biases and the decay rates
    of states do not.

    Args:
        model: the model.
        settings: rates and decays.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, _, leaf = name.rpartition(".")
            is_scale = (
                "norm" in module.rpartition(".")[2] or leaf.endswith("bias") or leaf == "A_log" or parameter.ndim < 2
            )
            (kept if is_scale else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    return keep_frozen(optimizer)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then half a cosine down to its last share."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
    low = settings.final_learning_rate
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
