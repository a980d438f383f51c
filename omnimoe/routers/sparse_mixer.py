"""Token choice whose weights are those of SparseMixer: alike, but where experts are nearly as good as each other.

What is unusual: an expert that was chosen is not weighed by how good it is. In the order of choice, each gets its share
of a softmax over the experts that are left and come near it, which is one where none does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.routers.base import register_router
from omnimoe.routers.top_k import TopKRouter


@register_router("sparse_mixer")
class SparseMixerRouter(TopKRouter):
    """The weights of GRIN in evaluation; in training too, where GRIN draws the choice and estimates its gradient.

    With shared experts that take part, the experts chosen share among themselves, in those parts, what a softmax over
    all of them and the shared experts gives them together.

    Source: https://arxiv.org/abs/2409.12136; with null and shared experts https://arxiv.org/abs/2511.12609.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TopKRouter.Config):
        """Token choice with SparseMixer's weights."""

        nearness: float = 0.02
        """Distance of two logits, as a part of the larger in size, up to which they count as near: twice GRIN's
        ``router_jitter_noise``."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.score != "softmax" or not self.normalize:
                raise ConfigError(
                    f"SparseMixer's weights are of a softmax and sum to one; leave score {self.score!r} 'softmax' and "
                    f"normalize {self.normalize} True"
                )
            self.check_not_negative("nearness")
            self.check_idle("SparseMixer's weights are divided by the sum of all", "normalize_min", "zero_keeps_share")

    config: SparseMixerRouter.Config

    def _weigh(self, scores: Tensor, logits: Tensor, gated: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        void, picked = chosen < 0, chosen.clamp_min(0)
        held, left = logits.gather(1, picked), logits
        parts = []
        for choice in range(chosen.shape[1]):
            best, place = held[:, choice, None], picked[:, choice, None]
            with torch.no_grad():
                far = (best - logits) / torch.maximum(logits.abs(), best.abs()) > self.config.nearness
            # where nothing is chosen anything finite will do
            rivals = torch.where(void[:, choice, None], logits, left).masked_fill(far, float("-inf"))
            parts.append((best - rivals.logsumexp(-1, keepdim=True)).exp())
            left = left.scatter(1, place, float("-inf"))
        weights = torch.cat(parts, dim=1).masked_fill(void, 0.0)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6) * self.config.routed_scaling_factor
        if not self.num_gated:
            return weights, None
        joint = torch.cat((held.masked_fill(void, float("-inf")), gated), dim=-1).softmax(-1)
        own, shared = joint.split((chosen.shape[1], self.num_gated), dim=-1)
        return weights * own.sum(-1, keepdim=True), shared


__all__ = ["SparseMixerRouter"]
