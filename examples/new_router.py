"""A new router: it compares directions, not dot products, so that no expert wins by the length of its vector alone.

Run it with ``python examples/new_router.py --steps 200``; three steps are enough to see that it trains.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from omnimoe import RoutedExperts, Router, Routing, load, record_routing, register_router
from omnimoe.routers import load_balance_loss
from omnimoe.train import Training, TrainSettings


@register_router("cosine")
class CosineRouter(Router):
    """Each row goes to the two experts nearest in direction (X-MoE, https://arxiv.org/abs/2204.09179)."""

    def __init__(self, config, *, hidden_size, num_experts, num_modalities):
        super().__init__()
        self.directions = nn.Parameter(torch.randn(num_experts, hidden_size))

    def forward(self, x, rows):
        probs = (10 * F.linear(F.normalize(x), F.normalize(self.directions)).float()).softmax(-1)
        weights, expert_ids = probs.topk(2)
        token_index = torch.arange(len(x), device=x.device).repeat_interleave(2)
        losses = {"balance": 0.01 * load_balance_loss(probs, expert_ids.flatten(), top_k=2)}
        return Routing(token_index, expert_ids.flatten(), weights.flatten().to(x.dtype), losses=losses)


def main(steps: int) -> None:
    experts = RoutedExperts.Config(num_experts=8, intermediate_size=256, router=CosineRouter.Config())
    model = load("dense_nano", seed=0, experts=experts)
    settings = TrainSettings(steps=steps, batch_size=4, sequence_length=128, evaluate_every=0, evaluate_batches=2)
    training = Training(model, settings)
    for modality, losses in training.run().held_out.items():
        print(f"{modality:<8} {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
    with record_routing(model) as trace, torch.no_grad():
        model(training.held_out[0]["input_ids"])
    print(trace)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args().steps)
