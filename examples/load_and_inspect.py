"""Loading a model by name, what is known of it, what it costs, and saving it.

Run it with ``python examples/load_and_inspect.py --model moma_nano``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

from omnimoe import flops, from_pretrained, list_models, load, model_info
from omnimoe.data import Corpus, PackedSequences


def main(name: str, steps: int) -> None:
    print("models:", ", ".join(list_models()))
    info = model_info(name)  # counted without building the model
    print(f"{name}: {info.description}")
    print(f"  {info.total_params:,} parameters; a token meets {info.active_params_by_modality}")
    print(f"  modalities {', '.join(info.modalities)}; {info.license}; {info.paper}")

    model = load(name, seed=0).eval()
    batches = PackedSequences(
        Corpus.load("p"), model.config.token_ranges, sequence_length=128, batch_size=2, split="val", axes=1
    )
    for step, batch in zip(range(steps), batches, strict=False):
        with torch.no_grad():
            out = model(**batch)
        cost = flops(model, batch)
        by_modality = {modality: f"{share / cost.total:.0%}" for modality, share in cost.by_modality.items()}
        print(f"batch {step + 1}: loss {out.loss:.3f}; {cost.per_token:,.0f} FLOPs a token, {by_modality}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        same = from_pretrained(folder)
    print("read back:", all(torch.equal(value, same.state_dict()[key]) for key, value in model.state_dict().items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mot_nano")
    parser.add_argument("--steps", type=int, default=3, help="batches to look at")
    args = parser.parse_args()
    main(args.model, args.steps)
