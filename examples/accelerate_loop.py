"""Training in a loop of one's own under accelerate, which needs ``pip install 'omnimoe[trainer]'``.

accelerate places the model, spreads the data over processes and scales the gradients of accumulated batches; a model of
omnimoe needs nothing for it. Losses by modality go to TensorBoard. Run it with
``python examples/accelerate_loop.py --steps 200``, or on several devices with ``accelerate launch``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from omnimoe import load
from omnimoe.data import Corpus, PackedSequences


class Packed(IterableDataset):
    """Endless packed rows, one sequence ``(T,)`` an item."""

    def __init__(self, config, *, sequence_length: int) -> None:
        self.batches = PackedSequences(
            Corpus.load("p"), config.token_ranges, sequence_length=sequence_length, batch_size=1, axes=1
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {name: value[0] for name, value in batch.items()}


def main(name: str, steps: int, accumulated: int, folder: str) -> None:
    if importlib.util.find_spec("accelerate") is None:
        sys.exit("this loop needs accelerate: pip install 'omnimoe[trainer]'")
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=accumulated, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("omnimoe")
    model = load(name, seed=0)
    rows = DataLoader(Packed(model.config, sequence_length=128), batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    step = 0
    for batch in rows:
        with accelerator.accumulate(model):
            out = model(**batch)
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        # for routers that adapt outside of the gradient
        accelerator.unwrap_model(model).update_routers(out.routings)
        told = {"loss": out.loss.item(), **{modality: loss.item() for modality, loss in out.losses.items()}}
        accelerator.log(told, step=step)
        accelerator.print(f"step {step:>4}  " + ", ".join(f"{key} {value:.3f}" for key, value in told.items()))
        if step == steps:
            break
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mot_nano")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--accumulated", type=int, default=2, help="batches whose gradients make one step")
    parser.add_argument("--logs", help="folder for TensorBoard; a temporary one where left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(args.model, args.steps, args.accumulated, args.logs or temporary)
