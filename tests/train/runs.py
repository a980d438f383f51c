"""Tiny models over the shipped corpus, and settings that train them in a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from omnimoe.data import Corpus
from omnimoe.experts import FeedForward, RoutedExperts
from omnimoe.layers import Attention
from omnimoe.model import MODELS, OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.routers import ByModalityRouter, ExpertChoiceRouter, TopKRouter
from omnimoe.train import Training, TrainSettings
from tests.refusals import Refusal, refused


def tiny(kind: str = "dense") -> OmniMoeConfig:
    """A model of two narrow layers in the vocabulary of the shipped corpus."""
    towers = "modality" if kind == "mot" else "shared"
    dense = MODELS.get("dense_nano")().replace(
        hidden_size=64,
        num_layers=2,
        attention=Attention.Config(num_heads=4, qk_norm="rms", towers=towers),
        experts=FeedForward.Config(intermediate_size=96, towers=towers),
    )
    inside = {"top_k": TopKRouter.Config(top_k=2), "expert_choice": ExpertChoiceRouter.Config(cutoff_momentum=0.5)}
    if kind not in inside:
        return dense
    router = ByModalityRouter.Config(experts=(3, 2, 2), router=inside[kind])
    return dense.replace(experts=RoutedExperts.Config(num_experts=7, intermediate_size=48, router=router))


def settings(**changes: Any) -> TrainSettings:
    """A short run on the CPU."""
    short: dict[str, Any] = {
        "steps": 6,
        "batch_size": 2,
        "sequence_length": 128,
        "warmup": 2,
        "precision": "fp32",
        "evaluate_every": 2,
        "evaluate_batches": 2,
        "log_every": 2,
    }
    return TrainSettings(**{**short, **changes})


def build(config: OmniMoeConfig, seed: int = 0) -> OmniMoeForCausalLM:
    """A model with fresh weights."""
    torch.manual_seed(seed)
    return OmniMoeForCausalLM(config)


def training(
    corpus: Corpus, kind: str = "dense", *, out: Path | None = None, seed: int = 0, **changes: Any
) -> Training:
    """A run of a tiny model."""
    return Training(build(tiny(kind), seed), settings(**changes), corpus=corpus, out=out, show_progress=False)


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two nested states hold the same values, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tensors(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_tensors, one, other))
    return one == other


def held_by(run: Training) -> dict[str, Any]:
    """What a step moves."""
    moments, data = run.optimizer.state_dict()["state"], run.batches.state_dict()
    return {"model": run.model, "moments": moments, "data": data, "step": run.step}


@contextmanager
def gives_up(run: Training, fragment: str, error: type[Exception]) -> Iterator[Refusal]:
    """A run whose next step is refused and moves nothing; where it is the first, the run seeds what it draws from."""
    if not run.step:
        torch.manual_seed(run.settings.seed)
    with refused(lambda: held_by(run), fragment, error) as told:
        yield told


def measured(run: Training) -> dict[str, Any]:
    """A run's history without what a clock says."""
    return {name: value for name, value in run.history.to_dict().items() if name != "seconds"}
