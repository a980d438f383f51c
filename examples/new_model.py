"""A new model in the zoo: declared in Python, and once more in a JSON file that needs no Python at all.

Both can then be loaded, trained and compared by name. Run it with ``python examples/new_model.py --steps 200``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from omnimoe import OmniMoeConfig, add_model_config, load, model_info, register_model
from omnimoe.train import Training, TrainSettings
from omnimoe.zoo.nano import dense_nano


@register_model("half_untied_nano")
def half_untied_nano() -> OmniMoeConfig:
    """A dense model whose pictures and speech share a tower of their own, in the feed-forward networks alone."""
    dense = dense_nano()
    return dense.replace(experts=dense.experts.replace(towers=(0, 1, 1)))


def declare_in_json(folder: Path) -> str:
    """Writes the same model, one layer deeper, as a file and registers the file; its name is the model's."""
    path = folder / "half_untied_deep.json"
    half_untied_nano().replace(num_layers=6).to_json_file(path)
    return add_model_config(path)


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = ["half_untied_nano", declare_in_json(Path(folder))]
    settings = TrainSettings(steps=steps, batch_size=4, sequence_length=128, evaluate_every=0, evaluate_batches=2)
    for name in names:
        info = model_info(name)
        print(f"{name}: {info.total_params:,} parameters, {info.active_params:,} active. {info.description}")
        for modality, losses in Training(load(name, seed=0), settings).run().held_out.items():
            print(f"  {modality:<8} {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args().steps)
