"""Training in a plain PyTorch loop: a model is an ``nn.Module``, a batch a dictionary of tensors, a loss a scalar.

Run it with ``python examples/plain_loop.py --model moma_nano --steps 200``.
"""

from __future__ import annotations

import argparse

import torch

from omnimoe import load
from omnimoe.data import Corpus, PackedSequences


def main(name: str, steps: int) -> None:
    model = load(name, seed=0)
    batches = PackedSequences(
        Corpus.load("p"), model.config.token_ranges, sequence_length=128, batch_size=4, seed=0, axes=1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step, batch in zip(range(steps), batches, strict=False):
        out = model(**batch)  # out.loss already holds the routers' balance losses
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(out.routings)  # for routers that adapt outside of the gradient
        told = ", ".join(f"{modality} {loss:.3f}" for modality, loss in out.losses.items())
        print(f"step {step + 1:>4}  loss {out.loss:.3f}  {told}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mot_nano")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    main(args.model, args.steps)
