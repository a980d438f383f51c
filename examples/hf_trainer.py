"""Training with transformers' Trainer, which needs accelerate: ``pip install accelerate``.

A model of omnimoe is a transformers model, so the Trainer's own features (devices, precision, logging, callbacks)
apply. Packed batches come whole from the data set, so the Trainer is told not to batch them again. Run it with
``python examples/hf_trainer.py --steps 200``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from omnimoe import load
from omnimoe.data import Corpus, PackedSequences


class OmniTrainer(Trainer):
    """Lets routers that adapt outside of the gradient (expert choice) take in each step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        model.update_routers(self.routings)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        self.routings = out.routings
        return (out.loss, out) if return_outputs else out.loss


class Packed(IterableDataset):
    """Endless packed rows, one sequence ``(T,)`` an item."""

    def __init__(self, config, *, sequence_length: int) -> None:
        self.batches = PackedSequences(
            Corpus.load("p"), config.token_ranges, sequence_length=sequence_length, batch_size=1, axes=1
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {name: value[0] for name, value in batch.items()}


def main(name: str, steps: int) -> None:
    if importlib.util.find_spec("accelerate") is None:
        sys.exit("transformers' Trainer needs accelerate: pip install accelerate")
    model = load(name, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        packed = Packed(model.config, sequence_length=128)
        OmniTrainer(model, arguments, train_dataset=packed).train()  # logs every step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mot_nano")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    main(args.model, args.steps)
