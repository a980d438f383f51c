"""Held-out pictures and clips, and what each tokenizer that can be run without a checkpoint of others gives back.

Writes a sheet of a few pictures and clips of words, and prints the mean PSNR of each picture tokenizer over all
held-out pictures. The pictures on the sheet are those of ``omnimoe eval --metrics tokenizers``. The 128-pixel form
needs the corpus at that size; without it its rows are left out.

    omnimoe data build --set P --out corpus-p
    omnimoe data build --set P --image-size 128 --out corpus-p-128
    python benchmarks/round_trips.py --raw corpus-p --raw-128 corpus-p-128 --out docs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from omnimoe.data import Corpus
from omnimoe.evaluate import Bench, RawCorpus, psnr
from omnimoe.evaluate.tokenizers import fit
from omnimoe.generate import Generated
from omnimoe.plots import draw_grid
from omnimoe.tokenizers import load_tokenizer
from omnimoe.tokenizers.picture import PictureCodec
from omnimoe.tokenizers.speech import SAMPLE_RATE
from omnimoe.tokenizers.training.common import indices_by_split
from omnimoe.tokenizers.training.picture import evaluate

SHEET = "round_trips.png"


def bring_back(tokenizer: PictureCodec, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures through ids, or through rows where the tokenizer has no ids, and back."""
    batch = np.stack(pictures)
    if tokenizer.is_continuous:
        return list(tokenizer.decode_rows_batch(tokenizer.encode_rows_batch(batch)))
    return list(tokenizer.decode_batch(tokenizer.encode_batch(batch)))


def figures(name: str, tokenizer: PictureCodec, raw: Path, split: str) -> None:
    """Prints the mean PSNR over all pictures of a split, and the codes in use."""
    pictures = held_out(raw, split)
    found = evaluate(tokenizer.network, torch.from_numpy(pictures))
    codes = f", {found['codes']} codes in use" if "codes" in found else ""
    print(f"{name}: {len(pictures)} pictures of {split}, PSNR {found['psnr']:.2f} dB{codes}", flush=True)


def enlarged(name: str, tokenizer: PictureCodec, raw: Path, larger: Path, split: str) -> None:
    """Prints the mean PSNR of what comes back, enlarged, against the same pictures drawn larger."""
    made, real = bring_back(tokenizer, list(held_out(raw, split))), held_out(larger, split)
    found = [psnr(picture, fit(back, picture)) for picture, back in zip(real, made, strict=True)]
    print(f"{name}, enlarged: PSNR {np.mean(found):.2f} dB at {real.shape[1]} pixels", flush=True)


def held_out(raw: Path, split: str) -> np.ndarray:
    """All pictures of a split, ``(N, S, S, 3)`` uint8."""
    return np.load(raw / "images.npy", mmap_mode="r")[indices_by_split(raw, "image")[split]]


def sheet(forms: list[tuple[str, PictureCodec, Path]], corpus: Corpus, split: str, num: int, path: Path) -> None:
    """The originals, and what comes back from each form under originals of its size."""
    rows: list[list[np.ndarray]] = []
    headings: list[str] = []
    size = 0
    for name, tokenizer, raw in forms:
        bench = Bench(models={}, corpus=corpus, split=split, raw=RawCorpus(raw, corpus), num=num)
        examples = bench.concepts("image")
        pictures = [bench.picture(example) for example in examples]
        if tokenizer.image_size != size:
            size = tokenizer.image_size
            rows.append(pictures)
            headings.append(f"original,\n{size} x {size}")
        rows.append(bring_back(tokenizer, pictures))
        kind = "latents" if tokenizer.is_continuous else "codes"
        headings.append(f"{name},\n{tokenizer.num_tokens} {kind}")
    captions = [bench.caption(example) for example in examples]
    print(draw_grid(rows, path, headings=headings, captions=captions))


def clips(raw: Path, split: str, words: list[str], modes: list[str], out: Path) -> None:
    """Each word through each mode of Codec 2, as WAV at the codec's rate."""
    with (raw / "rows.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == split and row["audio"] >= 0]
    places = {row["text"]: row["audio"] for row in rows if row["lang"] == "en"}
    audio, offsets = np.load(raw / "audio.npy", mmap_mode="r"), np.load(raw / "audio_offsets.npy")
    for word in words:
        clip = audio[offsets[places[word]] : offsets[places[word] + 1]]
        for mode in modes:
            tokenizer = load_tokenizer("codec2", mode=mode)
            ids = tokenizer.encode(clip, SAMPLE_RATE)
            made = Generated(modality="speech", raw=tokenizer.decode(ids), sample_rate=tokenizer.sample_rate)
            print(f"{made.save(out / f'{word}-codec2-{mode}.wav')}: {len(ids)} ids")


def main() -> None:
    """Prints a line a form and writes ``pictures/`` and ``sounds/`` into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of set P, built at 64 pixels")
    parser.add_argument("--raw-128", type=Path, help="folder of set P, built at 128 pixels")
    parser.add_argument("--large", type=Path, help="weights of picture_128, if not those that ship")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--num", type=int, default=12, help="pictures on the sheet")
    parser.add_argument("--words", nargs="*", default=["compelled", "unexpected"], help="captions of held-out clips")
    parser.add_argument("--modes", nargs="+", default=["3200", "1200", "700C"], help="of Codec 2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.raw_128 is None and args.large is not None:
        parser.error("--large needs the corpus at 128 pixels: --raw-128")
    forms = [(name, load_tokenizer(name), args.raw) for name in ("picture", "picture_latents")]
    if args.raw_128 is not None:
        forms.append(("picture_128", load_tokenizer("picture_128", args.large), args.raw_128))
    for folder in ("pictures", "sounds"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    sheet(forms, Corpus.load("p"), args.split, args.num, args.out / "pictures" / SHEET)
    clips(args.raw, args.split, args.words, args.modes, args.out / "sounds")
    for form in forms:
        figures(*form, args.split)
        if args.raw_128 not in (None, form[-1]):
            enlarged(*form, args.raw_128, args.split)


if __name__ == "__main__":
    main()
