"""Naming pictures from the features of a frozen encoder: EfficientNet-lite0, a linear connector, a tiny model.

Concepts are emoji of the shipped corpus. The model learns from some drawings of each and is asked about another one,
in a style of its own, that it never saw; the same question with the features of a wrong picture shows what the picture
is worth. ``pip install 'omnimoe[encoders]'``, then ``python examples/encoder_inputs.py --concepts 64 --steps 60``.
"""

from __future__ import annotations

import argparse

import torch

from omnimoe import (
    Attention,
    Connected,
    FeedForward,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    Tokens,
    load_encoder,
    load_tokenizer,
)
from omnimoe.connectors import Linear
from omnimoe.data import Corpus

PAD, EOS, BEGIN, END, PLACE = 0, 2, 3, 4, 15


def drawings(num_concepts: int) -> tuple[list, list]:
    """Rows to learn from, and one row a concept in a drawing that is not among them."""
    corpus = Corpus.load("p")
    known: dict[bytes, list] = {}
    for row in corpus.examples("train", sources=("emoji",), having=("text", "image")):
        known.setdefault(row.text.tobytes(), []).append(row)
    asked = {
        row.text.tobytes(): row for row in corpus.examples("drawing", sources=("emoji",), having=("text", "image"))
    }
    names = [name for name in asked if len(known.get(name, ())) >= 3]
    names = names[:: max(1, len(names) // num_concepts)][:num_concepts]  # from all groups, not faces alone
    return [row for name in names for row in known[name]], [asked[name] for name in names]


def make_batch(model: OmniMoeForCausalLM, rows: list, features) -> dict:
    """``<image> features </image> caption <eos>``, padded to one length; the caption alone is predicted."""
    spans = model.model.modalities["image"].span_ids(features)
    texts = [[*row.text.tolist(), EOS] for row in rows]
    length = len(spans[0]) + max(map(len, texts))
    ids = torch.full((len(rows), length), PAD)
    for place, (span, text) in enumerate(zip(spans, texts, strict=True)):
        ids[place, : len(span) + len(text)] = torch.cat((span, torch.tensor(text)))
    labels = ids.masked_fill((ids == PAD) | (ids == BEGIN) | (ids == END), -100)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels, "features": {"image": features}}


def main(concepts: int, steps: int) -> tuple[float, float]:
    text, picture = load_tokenizer("text"), load_tokenizer("picture")
    encoder = load_encoder("efficientnet_lite0", image_size=96)
    rows, asked = drawings(concepts)
    learned, tested = (
        encoder.encode([picture.decode(torch.as_tensor(row.image)) for row in part]) for part in (rows, asked)
    )
    image = Connected.Config(
        name="image",
        channels=encoder.hidden_size,
        connector=Linear.Config(),
        encoder=encoder.config,
        placeholder_id=PLACE,
        begin_id=BEGIN,
        end_id=END,
    )
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(
        OmniMoeConfig(
            hidden_size=64,
            num_layers=2,
            modalities=(Tokens.Config(name="text", vocab_size=text.vocab_size), image),
            attention=Attention.Config(num_heads=4, towers="modality"),
            experts=FeedForward.Config(intermediate_size=128, towers="modality"),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        chosen = torch.randperm(len(rows))[:32].tolist()
        loss = model(**make_batch(model, [rows[place] for place in chosen], learned[chosen])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"step {step + 1:>4}  loss {loss:.3f}")

    model.eval()
    with torch.no_grad():
        own = float(model(**make_batch(model, asked, tested)).loss)
        other = float(model(**make_batch(model, asked, tested[[*range(1, len(asked)), 0]])).loss)
    print(f"a drawing never seen: loss {own:.3f}; with the features of another one: {other:.3f}")
    prompt = torch.stack(model.model.modalities["image"].span_ids(tested))
    told = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        features={"image": tested},
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    names = [text.decode(row[(row != PAD) & (row != EOS)]) for row in told[:, prompt.shape[1] :]]
    wanted = [text.decode(torch.as_tensor(row.text)) for row in asked]
    right = sum(name == want for name, want in zip(names, wanted, strict=True))
    print(f"named exactly: {right} of {len(asked)}")
    for want, name in list(zip(wanted, names, strict=True))[:8]:
        print(f"  {want!r} is called {name!r}")
    return own, other


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    main(args.concepts, args.steps)
