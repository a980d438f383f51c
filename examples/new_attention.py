"""A new attention: a gate on what attention gives, one tower of it for each tower of the other projections.

Run it with ``python examples/new_attention.py --steps 200``; three steps are enough to see that it trains.
"""

from __future__ import annotations

import argparse

from omnimoe import Attention, load, register_attention
from omnimoe.layers import BankLinear, resolve_towers
from omnimoe.train import Training, TrainSettings


@register_attention("gated")
class GatedAttention(Attention):
    """Attention that each row can shut off by a gate it computes itself (after https://arxiv.org/abs/2505.06708)."""

    def __init__(self, config, *, hidden_size, num_modalities, layer_idx):
        super().__init__(config, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx)
        self.gate = BankLinear(resolve_towers(config.towers, num_modalities), hidden_size, hidden_size)

    def forward(self, x, rows, mask, cache=None):
        mixed, weights = super().forward(x, rows, mask, cache)
        return mixed * self.gate(x, rows).sigmoid(), weights


def main(steps: int) -> None:
    model = load("mot_nano", seed=0, attention=GatedAttention.Config(num_heads=6, qk_norm="rms", towers="modality"))
    settings = TrainSettings(steps=steps, batch_size=4, sequence_length=128, evaluate_every=0, evaluate_batches=2)
    for modality, losses in Training(model, settings).run().held_out.items():
        print(f"{modality:<8} {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args().steps)
