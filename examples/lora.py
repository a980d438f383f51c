"""LoRA on one tower of a Mixture-of-Transformers, with PEFT: ``pip install 'omnimoe[peft]'``.

The adapter goes on the image tower's copies of attention and experts. It is trained, saved, put on the model again and
merged; the towers of the other modalities keep every bit. Run it with ``python examples/lora.py --steps 100``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile

import torch

from omnimoe import add_lora, load
from omnimoe.data import Corpus, PackedSequences


def main(name: str, towers: list[str], steps: int) -> None:
    if importlib.util.find_spec("peft") is None:
        sys.exit("LoRA needs PEFT: pip install 'omnimoe[peft]'")
    from peft import PeftModel

    model = load(name, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = PackedSequences(
        Corpus.load("p"), model.config.token_ranges, sequence_length=128, batch_size=4, seed=0, axes=1
    )
    adapted = add_lora(model, towers=towers, r=8, lora_alpha=16)
    adapted.print_trainable_parameters()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step, batch in zip(range(steps), batches, strict=False):
        out = adapted(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told = ", ".join(f"{modality} {loss:.3f}" for modality, loss in out.losses.items())
        print(f"step {step + 1:>4}  {told}")

    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        merged = PeftModel.from_pretrained(load(name, seed=0), folder).merge_and_unload()
    changed = {key: value != before[key] for key, value in merged.state_dict().items()}
    copies = {tuple(differs.flatten(1).any(1).tolist()) for differs in changed.values() if differs.any()}
    print(f"copies changed, of {', '.join(model.config.modality_names)}: {copies}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mot_nano")
    parser.add_argument("--towers", nargs="+", default=["image"])
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    main(args.model, args.towers, args.steps)
