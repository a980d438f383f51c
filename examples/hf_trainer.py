"""Training with transformers' Trainer, which needs accelerate: ``pip install accelerate``.

A model of omnimoe is a transformers model, so the Trainer's own features (devices, precision, logging, callbacks)
apply. Losses by modality go wherever the Trainer reports, here to TensorBoard. Run it with
``python examples/hf_trainer.py --steps 200 --logs runs/hf``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from omnimoe import load
from omnimoe.data import Corpus, PackedSequences


class OmniTrainer(Trainer):
    """Lets routers that adapt outside of the gradient (expert choice) take in each batch, and logs by modality."""

    by_modality = {}

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.accelerator.unwrap_model(model).update_routers(self.routings)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # the loss is a batch's part of the mean over all tokens of the step, scaled for as many processes as there are
        loss, out = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.routings = out.routings
        self.by_modality = {f"loss_{name}": part.detach() for name, part in out.losses.items()}
        return (loss, out) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        held = {name: loss.item() for name, loss in self.by_modality.items()} if "loss" in logs else {}
        super().log({**logs, **held}, *args, **kwargs)


class Packed(IterableDataset):
    """Endless packed rows, one sequence ``(T,)`` an item."""

    def __init__(self, config, *, sequence_length: int) -> None:
        self.batches = PackedSequences(
            Corpus.load("p"), config.token_ranges, sequence_length=sequence_length, batch_size=1, axes=1
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield {name: value[0] for name, value in batch.items()}


def main(name: str, steps: int, logs: str | None) -> None:
    if importlib.util.find_spec("accelerate") is None:
        sys.exit("transformers' Trainer needs accelerate: pip install accelerate")
    model = load(name, seed=0)
    if logs:
        os.environ["TENSORBOARD_LOGGING_DIR"] = logs
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="tensorboard" if logs else "none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        packed = Packed(model.config, sequence_length=128)
        OmniTrainer(model, arguments, train_dataset=packed).train()  # logs every step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mot_nano")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--logs", help="folder for TensorBoard")
    args = parser.parse_args()
    main(args.model, args.steps, args.logs)
