"""Every direction from one model: pictures and speech from words, words and speech from a picture, a mixed document.

    python examples/generate.py --text "red heart" --out generated
    python examples/generate.py my-run/checkpoint --text "red heart" --out generated

The folder is what ``model.save_pretrained`` or ``omnimoe train`` wrote; without one, the model that ships.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omnimoe import from_pretrained, load
from omnimoe.generate import generate, interleave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a saved model, or a Hub id; omni_nano where none is given")
    parser.add_argument("--text", default="red heart")
    parser.add_argument("--out", type=Path, default=Path("generated"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = load("omni_nano", pretrained=True) if args.model is None else from_pretrained(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"seed": args.seed}  # how it is sampled is saved with the model, else passed here

    pictures = generate(model, {"text": args.text}, to="image", num_samples=4, **options)
    for number, picture in enumerate(pictures, 1):
        print(f"text -> image: {picture.save(args.out / f'picture_{number}.png')}")

    (spoken,) = generate(model, {"text": args.text}, to="speech", **options)
    print(f"text -> speech: {spoken.save(args.out / 'spoken.wav')}, {len(spoken.raw) / spoken.sample_rate:.1f} s")

    # A raw output is a raw input: the first picture is described, and spoken of.
    (told,) = generate(model, {"image": pictures[0].raw}, to="text", **options)
    print(f"image -> text: {told.raw!r}")
    (heard,) = generate(model, {"speech": spoken.raw}, to="text", **options)
    print(f"speech -> text: {heard.raw!r}")
    (described,) = generate(model, {"image": pictures[0].raw}, to="speech", **options)
    print(f"image -> speech: {described.save(args.out / 'described.wav')}")
    (seen,) = generate(model, {"speech": spoken.raw}, to="image", **options)
    print(f"speech -> image: {seen.save(args.out / 'seen.png')}")

    # Left to itself, the model chooses what comes next.
    (document,) = interleave(model, {"text": args.text}, **options)
    print(f"continued by: {', '.join(f'{span.modality} ({len(span.ids)} tokens)' for span in document) or 'nothing'}")


if __name__ == "__main__":
    main()
