"""``omnimoe quickstart``: the main job, start to end, on real data that ships with the package."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

SEED = 0
DENSE, MOT = "dense_nano", "mot_nano"
CAPTIONS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", type=Path, default=Path("omnimoe-quickstart"), help="folder to write")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps a model; more make better pictures")


def run(args: argparse.Namespace) -> int:
    """Trains, compares, saves, reloads, generates and reports."""
    started = time.perf_counter()
    from omnimoe.data import Corpus
    from omnimoe.train import TrainSettings

    args.out.mkdir(parents=True, exist_ok=True)
    settings = TrainSettings(
        steps=args.steps,
        warmup=min(40, args.steps // 4),
        learning_rate=3e-3,
        text_share=0.1,
        evaluate_every=max(1, args.steps // 12),
        evaluate_batches=6,
    )
    corpus = Corpus.load("p")
    splits = corpus.summary()
    seen = splits["train"]
    tokens = settings.steps * settings.tokens_per_step
    print(
        f"omnimoe quickstart: trains {MOT}, a Mixture-of-Transformers with a tower each for text, pictures and\n"
        f"speech, beside its dense twin {DENSE}, on the same {tokens:,} tokens in the same order, at the same FLOPs\n"
        f"a token. Data: set P, {seen['pictures']:,} pictures and {seen['clips']:,} spoken labels to learn from;\n"
        "held-out concepts are never seen. It ships with the package, so nothing is downloaded.\n"
    )
    comparison, models = _train(args.out, settings, corpus)
    model = _save_and_reload(models[MOT], args.out / "checkpoint", settings, corpus)
    pictures, texts, sound = _generate(model, models[DENSE], corpus, args.out)
    routing = _draw_routing(model, settings, corpus, args.out)
    _report(args.out, comparison, splits, settings, pictures, texts, sound, routing, time.perf_counter() - started)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Open {args.out / 'report.html'}\n")
    print("Next:\n" + "\n".join(f"  {command}" for command in next_commands(args.out)))
    return 0


def next_commands(out: Path) -> list[str]:
    """Three things to try after the quickstart."""
    return [
        f'omnimoe generate --model {out / "checkpoint"} --from text "a red apple" --to image --out apple.png',
        "omnimoe compare dense mot moma moe --steps 600 --seeds 3",
        "omnimoe train mot_micro --steps 4000 --out runs/mot_micro",
    ]


def _train(out: Path, settings, corpus):
    from omnimoe.commands._tables import comparison_table, console
    from omnimoe.compare import compare

    models = {}

    def keep(name: str, seed: int, training) -> None:
        models[name] = training.model
        history = training.history
        print(
            f"{name}: {history.seconds:.0f} s, {history.tokens / history.seconds:,.0f} tokens/s, held-out loss "
            f"{history.held_out['all'][0]:.2f} -> {history.held_out['all'][-1]:.2f}"
        )

    comparison = compare([DENSE, MOT], settings, seeds=(SEED,), corpus=corpus, out=out, on_model=keep)
    print()
    console().print(comparison_table(comparison.rows(), comparison.modalities))
    print(f"\nsteps: share of {DENSE}'s steps that {MOT} needs to reach its held-out loss; one seed, only a hint\n")
    return comparison, models


def _save_and_reload(model, folder: Path, settings, corpus):
    import torch

    from omnimoe import from_pretrained
    from omnimoe.train import held_out_batches, save_checkpoint

    save_checkpoint(folder, model, settings, None)
    reloaded = from_pretrained(folder)
    batch = held_out_batches(model.config, settings, corpus, split="test", count=1)[0]
    read = reloaded.state_dict()
    if not all(torch.equal(value, read[name]) for name, value in model.state_dict().items()):
        raise RuntimeError(f"the weights read back from {folder} are not those that were saved")
    with torch.no_grad():
        apart = float((model.eval()(**batch).logits - reloaded.eval()(**batch).logits).abs().max())
    print(f"saved to {folder} and read back: the same weights to the bit, logits within {apart:.0e}")
    return reloaded


def _generate(model, dense, corpus, out: Path):
    from omnimoe.generate import generate
    from omnimoe.plots import draw_grid
    from omnimoe.tokenizers import load_tokenizer

    words, pixels = load_tokenizer("text"), load_tokenizer("picture")
    examples = _held_out_examples(corpus, CAPTIONS)
    captions = [words.decode(_ids(example.text)) for example in examples]
    real = [pixels.decode(_ids(example.image)) for example in examples]
    asked = [[("text", caption)] for caption in captions]
    drawn = {}
    for name, which in ((MOT, model.eval()), (DENSE, dense.eval())):
        made = generate(which, asked, to="image", seed=SEED, temperature=1.0, top_k=300)
        drawn[name] = [picture.raw for picture in made]
    path = draw_grid(
        [real, drawn[MOT], drawn[DENSE]],
        out / "pictures.png",
        captions=captions,
        headings=["real, decoded", MOT, DENSE],
    )
    print(f"drew {len(captions)} held-out captions: {path}")
    told = generate(model, [[("image", seen)] for seen in real], to="text", seed=SEED, temperature=0.5, top_k=50)
    texts = [(caption, made.raw.strip()) for caption, made in zip(captions, told, strict=True)]
    print("named the held-out pictures: " + "; ".join(f"{wanted!r} -> {got!r}" for wanted, got in texts[:3]))
    spoken = generate(model, [[("text", captions[0])]], to="speech", seed=SEED, temperature=0.8, top_k=50)[0]
    sound = spoken.save(out / "speech.wav")
    return path, texts, (sound, captions[0])


def _held_out_examples(corpus, number: int):
    """Half of them concepts never seen, half known concepts in a drawing never seen; no caption twice."""
    import numpy as np

    generator = np.random.default_rng(SEED)
    chosen = []
    for split in ("test", "drawing"):
        by_caption = {
            tuple(example.text): example
            for example in corpus.examples(split, languages=("en",), having=("text", "image"))
        }
        found = list(by_caption.values())
        picked = generator.choice(len(found), size=min(number // 2, len(found)), replace=False)
        chosen += [found[index] for index in sorted(picked)]
    return chosen


def _ids(values):
    import torch

    return torch.as_tensor(values, dtype=torch.int64)


def _draw_routing(model, settings, corpus, out: Path) -> Path:
    from omnimoe.routing_load import draw_model_routing
    from omnimoe.train import held_out_batches

    batches = held_out_batches(model.config, settings, corpus, split="test", count=2)
    path = draw_model_routing(
        model, batches, out / "routing.png", title=f"{MOT}: the modality of a token picks its tower"
    )
    print(f"drew where the tokens of each modality go: {path}")
    return path


def _report(out: Path, comparison, splits, settings, pictures, texts, sound, routing, seconds: float) -> None:
    from omnimoe.commands._tables import count, spread
    from omnimoe.report import Report

    report = Report("omnimoe quickstart")
    report.text(
        f"{MOT} is a Mixture-of-Transformers: attention, feed-forward networks and norms have one copy for each of "
        f"text, pictures and speech, and one attention over the whole sequence joins them. {DENSE} is the same model "
        f"with one copy of everything. Both were trained on the same {settings.steps * settings.tokens_per_step:,} "
        f"tokens in the same order; a token costs both the same FLOPs. The whole run took {seconds:.0f} seconds on "
        "this machine."
    )
    report.heading("Which learns faster?")
    modalities = comparison.modalities
    header = ["model", "parameters", "active", f"FLOPs/token, sequences of {settings.sequence_length}", "time"]
    header += [f"loss, {name}" for name in modalities] + [f"steps, {name}" for name in modalities]
    report.table(
        header,
        [
            [
                row["model"],
                count(row["total_params"]),
                count(row["active_params"]),
                count(row["flops_per_token"]),
                f"{row['seconds']:.0f} s",
                *(spread(row["loss"][name]) for name in modalities),
                *(
                    "100 %" if row["model"] == DENSE else spread(row["share"][name], percent=True)
                    for name in modalities
                ),
            ]
            for row in comparison.rows()
        ],
    )
    report.text(
        f"Steps: the share of {DENSE}'s steps that a model needs to reach the same held-out loss (nats a token). One "
        "seed and a few minutes of training: a hint, not a result. 'omnimoe compare' runs several seeds.",
        quiet=True,
    )
    report.picture(out / "curves.png", "held-out loss against steps, a panel for each modality")
    report.heading("Pictures from held-out captions")
    report.text(
        "Top: the real pictures after the tokenizer and back, the best a model over these 64 tokens could draw. The "
        "left half are concepts that were never seen, the right half known concepts in a drawing that was never seen. "
        "After this little training expect blobs of a plausible colour."
    )
    report.picture(pictures, "real and generated pictures for held-out captions")
    report.heading("Names for held-out pictures")
    report.text("After this little training expect the length and the letters of a caption, not its sense.")
    report.table(["caption", MOT], [list(pair) for pair in texts])
    report.heading("A caption spoken")
    report.sound(*sound)
    report.heading("Where tokens go")
    report.text(
        "Here the modality alone decides, so every share is one: that is what the picture must show for towers. "
        "'omnimoe compare' draws the same for routers that learn, such as those of moma_nano and moe_nano."
    )
    report.picture(routing, "share of each modality's tokens that meets each copy of each layer")
    report.heading("Data")
    names = list(splits["train"])
    report.table(["split", *names], [[split, *(f"{row[name]:,}" for name in names)] for split, row in splits.items()])
    report.heading("Next")
    report.code("\n".join(next_commands(out)))
    report.write(out / "report.html")
