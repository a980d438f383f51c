"""A new kind of expert: several side by side, here a feed-forward network for all and a narrow one for each modality.

Run it with ``python examples/new_expert.py --steps 200``; three steps are enough to see that it trains.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from torch import nn

from omnimoe import Experts, FeedForward, load, register_expert
from omnimoe.train import Training, TrainSettings


@register_expert("side_by_side")
class SideBySide(Experts):
    """Experts of any kind whose outputs are added."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        parts: tuple[Experts.Config, ...] = ()

    def __init__(self, config, **sizes):
        super().__init__()
        self.parts = nn.ModuleList(part.build(**sizes) for part in config.parts)

    def forward(self, x, rows):
        return sum(part(x, rows)[0] for part in self.parts), None


def main(steps: int) -> None:
    shared = FeedForward.Config(intermediate_size=512)
    adapters = FeedForward.Config(intermediate_size=32, towers="modality")
    model = load("dense_nano", seed=0, experts=SideBySide.Config(parts=(shared, adapters)))
    settings = TrainSettings(steps=steps, batch_size=4, sequence_length=128, evaluate_every=0, evaluate_batches=2)
    for modality, losses in Training(model, settings).run().held_out.items():
        print(f"{modality:<8} {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args().steps)
