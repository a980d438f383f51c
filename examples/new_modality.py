"""A new continuous modality: pictures as rows of plain colours, which a model reads a caption for and paints in order.

The pictures are those of the shipped corpus, made from their tokens and averaged to 8 x 8 colours. Every position is
given the colour before it and predicts its own, so the model learns to continue a picture. Run it with
``python examples/new_modality.py --steps 200``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn

from omnimoe import FeedForward, Modality, OmniMoeConfig, OmniMoeForCausalLM, Tokens, load_tokenizer, register_modality
from omnimoe.data import Corpus


@register_modality("colours")
class Colours(Modality):
    """A row is a colour, red, green and blue in 0..1; its loss is the squared error, which the base class gives."""

    def __init__(self, config, *, hidden_size):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, hidden_size), nn.Linear(hidden_size, 3)

    def embed(self, inputs, timesteps=None):
        return self.enter(inputs)

    def head(self, x):
        return self.leave(x)


PAD, BOS, EOS, PLACE = 0, 1, 2, 3
CELLS = 64


def make_batch(examples: list, picture) -> dict:
    """Captions with their pictures: ``<bos> caption <place> x 64 <eos>``, padded to one length."""
    texts = [example.text.tolist() for example in examples]
    length = max(map(len, texts)) + CELLS + 2
    rows = [[BOS, *text, *[PLACE] * CELLS, EOS] for text in texts]
    input_ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    drawn = np.stack([picture.decode(torch.as_tensor(example.image)) for example in examples])
    size = drawn.shape[1] // 8
    colours = torch.from_numpy(drawn.reshape(len(rows), 8, size, 8, size, 3).mean((2, 4)) / 255).float()
    colours = colours.view(len(rows), CELLS, 3)
    before = torch.cat([torch.zeros(len(rows), 1, 3), colours[:, :-1]], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "labels": input_ids.masked_fill((input_ids == PAD) | (input_ids == PLACE), -100),
        "features": {"picture": before.reshape(-1, 3)},
        "targets": {"picture": colours.reshape(-1, 3)},
    }


def main(steps: int) -> None:
    text, picture = load_tokenizer("text"), load_tokenizer("picture")
    config = OmniMoeConfig(
        hidden_size=128,
        num_layers=3,
        modalities=(
            Tokens.Config(name="text", vocab_size=text.vocab_size),
            Colours.Config(name="picture", placeholder_id=PLACE, loss_weight=10.0),
        ),
        experts=FeedForward.Config(intermediate_size=256, towers="modality"),
    )
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(config)
    corpus = Corpus.load("p")
    rows = corpus.select("train", having=("text", "image"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        chosen = rows[torch.randint(len(rows), (8,)).numpy()]
        out = model(**make_batch([corpus[int(row)] for row in chosen], picture))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            told = ", ".join(f"{modality} {loss:.4f}" for modality, loss in out.losses.items())
            print(f"step {step + 1:>4}  {told}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args().steps)
