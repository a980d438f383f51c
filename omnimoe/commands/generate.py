"""``omnimoe generate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ENDINGS = {"image": (".png", ".jpg", ".jpeg", ".webp", ".bmp"), "speech": (".wav",)}
"""What an output file may be called."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", required=True, help="folder of a saved model, Hub id, or a name of the zoo with weights"
    )
    parser.add_argument(
        "--from",
        dest="sources",
        nargs=2,
        action="append",
        default=[],
        metavar=("MODALITY", "INPUT"),
        help='an input: text "a red apple", image apple.png, speech apple.wav; several are one document, in order',
    )
    parser.add_argument("--to", required=True, metavar="MODALITY", help="what to generate: text, image or speech")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write it; text is printed where this is left out"
    )
    parser.add_argument(
        "--num", type=int, default=1, metavar="N", help="samples; files are numbered then: x_1.png, ..."
    )
    parser.add_argument("--seed", type=int, help="repeats the same samples")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among so many tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the tokens that hold this share")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text or speech, in tokens")
    parser.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda; the fastest there is if left out")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Generates, writes and tells what was written."""
    # Wrong calls are told before the seconds that a model takes to load.
    files = _files(args.to, args.out, args.num)

    from omnimoe.generate import generate

    document = [(modality, _raw(modality, given)) for modality, given in args.sources]
    model = _model(args.model, args.device)
    made = generate(
        model,
        document,
        to=args.to,
        seed=args.seed,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        num_samples=args.num,
    )
    told: list[dict[str, Any]] = []
    for found, file in zip(made, files, strict=True):
        sample: dict[str, Any] = {"modality": found.modality, "num_tokens": len(found.ids)}
        if isinstance(found.raw, str):
            sample["text"] = found.raw
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            sample["file"] = str(found.save(file))
        told.append(sample)
    if args.json:
        print(json.dumps({"model": args.model, "to": args.to, "seed": args.seed, "samples": told}))
    else:
        for sample in told:
            print(f"wrote {sample['file']}" if "file" in sample else sample["text"])
    return 0


def _files(to: str, out: Path | None, count: int) -> list[Path | None]:
    if count < 1:
        raise ValueError(f"--num must be at least 1, got {count}")
    if out is None:
        if to in ENDINGS:
            raise ValueError(f"--to {to} needs a file to write: --out {to}{ENDINGS[to][0]}")
        return [None] * count
    if to in ENDINGS and out.suffix.lower() not in ENDINGS[to]:
        raise ValueError(f"--out must end in {', '.join(ENDINGS[to])} for {to}, got {str(out)!r}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    return [out] if count == 1 else [out.with_name(f"{out.stem}_{i}{out.suffix}") for i in range(1, count + 1)]


def _raw(modality: str, given: str) -> Any:
    from omnimoe.generate import read_wave

    return read_wave(given) if modality == "speech" else given


def _model(name: str, device: str | None):
    import torch

    from omnimoe.hub import from_pretrained, load, model_info
    from omnimoe.model import MODELS

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name in MODELS and not Path(name).is_dir():
        if model_info(name).pretrained is None:
            raise ValueError(f"there are no weights for {name!r}; train it first and pass the folder: --model DIR")
        return load(name, pretrained=True, device=device)
    return from_pretrained(name, device=device)
