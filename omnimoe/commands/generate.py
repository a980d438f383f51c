"""``omnimoe generate``."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimoe.commands._model import DEFAULT, add_model, by_modality, default_device, read_model, read_tokenizers
from omnimoe.generation import ANY

if TYPE_CHECKING:
    from omnimoe.model import OmniMoeConfig
    from omnimoe.pipelines import Pipeline

ENDINGS = {"image": (".png", ".jpg", ".jpeg", ".webp", ".bmp"), "speech": (".wav",), "video": (".gif", ".webp")}
"""What an output file may be called."""
PAGES = (".html", ".htm")
"""What a page of interleaved documents may be called."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser, default=DEFAULT)
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        action="append",
        default=[],
        metavar=("MODALITY", "INPUT"),
        help='an input: text "a red apple", image apple.png, speech apple.wav; several are one document, in order: '
        '--from again, or image,text apple.png "make it green"',
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="many inputs: a caption a line, or .jsonl with a document a line"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="MODALITY",
        help="text, image, speech or video; any lets the model choose, span by span",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write it; for --to any a folder, or an .html page"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="a contact sheet of all pictures with their captions")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="samples a prompt; files are numbered then")
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="draw N and keep the --num under which the inputs are likeliest"
    )
    parser.add_argument("--seed", type=int, help="repeats the same samples")
    choices = parser.add_argument_group(
        "sampling, each X or by modality, text=X,image=Y; left out, as the model was saved with"
    )
    number, whole = by_modality(float), by_modality(int)
    choices.add_argument("--temperature", type=number, metavar="X", help="0 takes the most likely token")
    choices.add_argument("--top-k", type=whole, metavar="K", help="sample among so many tokens")
    choices.add_argument("--top-p", type=number, metavar="P", help="sample among the tokens that hold this share")
    choices.add_argument("--min-p", type=number, metavar="P", help="and not below this share of the likeliest")
    choices.add_argument(
        "--guidance", type=number, metavar="X", help="classifier-free guidance of pictures and sounds; 1 is none"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of denoising, for what is denoised; 50 if left out"
    )
    parser.add_argument(
        "--size", metavar="HEIGHTxWIDTH", help="of pictures in pixels, for published models that draw any size"
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="pictures of a clip, for published models that film (--to video)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text, speech or document, in tokens")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows that are generated at once")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Generates, writes and tells what was written."""
    # Wrong calls are told before the seconds that a model takes to load.
    tokenizers = read_tokenizers(args.tokenizer)
    sources = [pair for given in args.sources for pair in _paired(given)]
    _check(args, kind=tokenizers[args.to].modality if args.to in tokenizers else args.to)

    from omnimoe.generate import generate, interleave
    from omnimoe.generation.prompt_files import read_prompts, read_raw
    from omnimoe.pipelines import find_pipeline

    given = [(modality, read_raw(modality, source)) for modality, source in sources]
    documents = [given] if args.prompts is None else read_prompts(args.prompts)
    published = find_pipeline(args.model)
    if published is not None:
        return _run_published(*published, documents, args)
    if args.size is not None:
        raise ValueError(f"--size is for published models that draw any size; {args.model} draws one")
    if args.frames is not None:
        raise ValueError(f"--frames is for published models that film; {args.model} does not")
    options: dict[str, Any] = {"tokenizers": tokenizers, "num_samples": args.num}
    options |= {
        name: getattr(args, name)
        for name in ("seed", "temperature", "top_k", "top_p", "min_p", "guidance", "batch_size")
    }
    options |= {name: getattr(args, name) for name in ("steps", "max_new_tokens") if getattr(args, name) is not None}
    config = _config(args.model)
    if config is not None:
        _check_modalities(config, documents, args)
    model = read_model(args.model, args.device)
    _check_modalities(model.config, documents, args)
    is_streamed = sys.stdout.isatty() and not args.json and args.to in ("text", ANY) and len(documents) * args.num == 1
    if is_streamed and args.best_of is None:
        options["on_text"] = lambda text: print(text, end="", flush=True)
    if args.to == ANY:
        made = interleave(model, documents, **options)
        told = _write_documents(made, documents, args)
    else:
        flat = generate(model, documents, to=args.to, best_of=args.best_of, **options)
        told = _write(flat, documents, args)
    if "on_text" in options:
        print()
    _tell(told, args, is_streamed="on_text" in options)
    return 0


def _run_published(kind: type[Pipeline], source: str, documents: list, args: argparse.Namespace) -> int:
    """The same by the pipeline of a published family, which has tokenizers and a way of drawing of its own."""
    import torch

    from omnimoe.encoders.raw import whole_pictures
    from omnimoe.generation.media import Generated
    from omnimoe.pipelines import Pipeline

    has_any = kind.interleave is not Pipeline.interleave
    if args.to not in (*kind.targets, *([ANY] if has_any else [])):
        raise ValueError(f"{source} makes {', '.join(kind.targets)}, not {args.to!r}")
    for name in ("best_of", "tokenizer"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for models of our own; leave it out with {source}")
    unknown = sorted({name for document in documents for name, _ in document} - {"text", "image"})
    if unknown:
        raise ValueError(f"{source} takes text and image, not {unknown[0]!r}; write --from text or --from image")
    size = None if args.size is None else _size(args.size)
    # a picture may be given by its path, and a text is never one
    read = [[Path(raw) if kind != "text" and isinstance(raw, str) else raw for kind, raw in held] for held in documents]
    asked = [document for document in read for _ in range(args.num)]
    chosen = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if args.frames is not None and args.to != "video":
        raise ValueError(f"--frames is for --to video, not for --to {args.to}; leave it out")
    unheard = {"text": ("size", "steps", "guidance"), ANY: ("size", "steps")}.get(args.to, ())
    if given := [name for name in unheard if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0]} changes nothing of --to {args.to} with {source}; leave it out")
    if args.to != "text":
        makes: Any = {"image": kind.draw, "video": kind.film}.get(args.to, kind.interleave)
        if unused := sorted(set(chosen) - set(inspect.signature(makes).parameters)):
            raise ValueError(f"--{unused[0].replace('_', '-')} changes nothing of what {source} draws; leave it out")
    for document in read:  # a file that is no picture is told before the model is loaded
        whole_pictures([part for part in document if isinstance(part, Path)])
    device = default_device(args.device)
    pipeline = kind.from_pretrained(source, device=device, dtype="float32" if device == "cpu" else "auto")
    made: list[Generated] = []
    documents_made: list[list[Generated]] = []
    for start in range(0, len(asked), args.batch_size):
        part = asked[start : start + args.batch_size]
        seed = None if args.seed is None else args.seed + start
        if args.to == "image":
            drawn = pipeline.draw(part, sizes=size, guidance=args.guidance, steps=args.steps, seed=seed, **chosen)
            made += [Generated(modality="image", raw=picture) for picture in drawn]
        elif args.to == "video":
            options = {"sizes": size, "num_frames": args.frames, "guidance": args.guidance, "steps": args.steps}
            clips = pipeline.film(part, seed=seed, **options, **chosen)
            made += [Generated(modality="video", raw=clip.frames) for clip in clips]
        elif args.to == ANY:
            guided = {"guidance": args.guidance, "max_new_tokens": args.max_new_tokens}
            documents_made += pipeline.interleave(part, seed=seed, **guided, **chosen)
        else:
            is_sampled = bool(chosen) and chosen.get("temperature") != 0
            options = {**chosen, "do_sample": True} if is_sampled else {"do_sample": False}
            if args.seed is not None:
                torch.manual_seed(args.seed + start)
            said = pipeline.answer(part, max_new_tokens=args.max_new_tokens or 512, **options)
            made += [Generated(modality="text", raw=text) for text in said]
    told = _write_documents(documents_made, documents, args) if args.to == ANY else _write(made, documents, args)
    _tell(told, args, is_streamed=False)
    return 0


def _paired(given: list[str]) -> list[tuple[str, str]]:
    """The inputs of one ``--from``: names with commas between them, then as many inputs."""
    names, inputs = given[0].split(","), given[1:]
    if len(names) != len(inputs):
        held = "an input" if len(names) == 1 else f"{len(names)} inputs"
        raise ValueError(f"--from {given[0]} takes {held}, got {len(inputs)}; put words of a text into quotes")
    return list(zip(names, inputs, strict=True))


def _size(given: str) -> tuple[int, int]:
    tall, cross, wide = given.lower().partition("x")
    if not (cross and tall.isdigit() and wide.isdigit()):
        raise ValueError(f"--size is HEIGHTxWIDTH in pixels, such as 768x1024, got {given!r}")
    return int(tall), int(wide)


def _config(name: str) -> OmniMoeConfig | None:
    """The config of a model of ours, before the weights are read or fetched; else None."""
    from omnimoe.checkpoint import Hub, Source
    from omnimoe.model import MODELS, OmniMoeConfig

    if name in MODELS and not Path(name).is_dir():
        return MODELS.get(name)()
    try:
        folder = Source.find(name, hub=Hub()).fetch()
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return OmniMoeConfig.from_pretrained(folder) if held.get("model_type") == OmniMoeConfig.model_type else None
    except (OSError, ValueError):
        return None  # whoever loads it says what is wrong with it


def _check_modalities(config: OmniMoeConfig, documents: list, args: argparse.Namespace) -> None:
    """Refuses modalities that the model has not, and steps where nothing is denoised."""
    from omnimoe.generation.prompts import check_modality, check_target

    for name in (name for document in documents for name, _ in document):
        check_modality(config, name)
    if args.to != ANY:
        check_target(config, args.to)
    denoised = [name for name in config.modality_names if name not in config.token_ranges]
    if args.steps is not None and not (denoised if args.to == ANY else args.to in denoised):
        raise ValueError(f"--steps is for what is denoised; {args.model} makes {args.to} token by token; leave it out")


def _check(args: argparse.Namespace, *, kind: str) -> None:
    """Refuses wrong calls; ``kind`` is what the target is: ``"image"``, whatever the model calls it."""
    for name in ("num", "best_of", "steps", "frames", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    _check_files(args, kind)
    for option, path in (("--out", args.out), ("--sheet", args.sheet)):
        if path is not None:
            _check_place(option, path)


def _check_files(args: argparse.Namespace, kind: str) -> None:
    if args.prompts is not None and args.sources:
        raise ValueError("--prompts holds all inputs; leave --from out, or write it into each document of a .jsonl")
    if args.to == ANY:
        if args.out is None:
            raise ValueError("--to any needs a folder or a page to write: --out made, or --out made.html")
        if args.best_of is not None or args.sheet is not None:
            raise ValueError("--best-of and --sheet are for one modality, not for --to any; leave them out")
        if args.out.suffix.lower() not in ("", *PAGES) and not args.out.is_dir():
            raise ValueError(
                f"--to any writes a folder or a page, and --out {args.out} is called as neither; write --out "
                f"{args.out.with_suffix('')} or --out {args.out.with_suffix('.html')}"
            )
        if args.out.is_file() and not args.out.suffix:
            raise ValueError(f"--out {args.out} is a file; name a folder, or a page that ends in .html")
        return
    if args.sheet is not None and kind in ("text", "speech"):
        raise ValueError(f"--sheet shows pictures, not {args.to}; use --out")
    if args.sheet is not None and args.sheet.suffix.lower() not in ENDINGS["image"]:
        raise ValueError(f"--sheet must end in {', '.join(ENDINGS['image'])}, got {str(args.sheet)!r}")
    if args.out is None:
        if kind in ENDINGS and args.sheet is None:
            raise ValueError(f"--to {args.to} needs a file to write: --out {args.to}{ENDINGS[kind][0]}")
        return
    if kind in ENDINGS and args.out.suffix.lower() not in ENDINGS[kind]:
        raise ValueError(f"--out must end in {', '.join(ENDINGS[kind])} for {args.to}, got {str(args.out)!r}")
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file")


def _check_place(option: str, path: Path) -> None:
    """Refuses a path that cannot be written, before anything is made to be written there; it leaves nothing behind."""
    try:
        if path.exists() and not path.is_dir():
            # a device or a pipe is left alone: opening one can wait for whoever reads it
            if path.is_file():
                path.open("ab").close()
            return
        nearest = next(place for place in (path, *path.parents, Path()) if place.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}; choose another place") from None


def _write(made: list, documents: list, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes samples of one modality, numbered by prompt and by sample where there are several."""
    told: list[dict[str, Any]] = []
    for place, found in enumerate(made):
        prompt, number = divmod(place, args.num)
        sample: dict[str, Any] = {"prompt": prompt + 1, "modality": found.modality, "num_tokens": len(found)}
        if found.score is not None:
            sample["score"] = round(found.score, 4)
        if isinstance(found.raw, str):
            sample["text"] = found.raw
        if args.out is not None:
            parts = [str(prompt + 1)] * (len(documents) > 1) + [str(number + 1)] * (args.num > 1)
            file = args.out.with_name("_".join([args.out.stem, *parts]) + args.out.suffix)
            file.parent.mkdir(parents=True, exist_ok=True)
            sample["file"] = str(found.save(file))
        told.append(sample)
    if args.sheet is not None:
        from omnimoe.generation.sheet import draw_sheet

        groups = [[found.raw for found in made[start : start + args.num]] for start in range(0, len(made), args.num)]
        draw_sheet(groups, [_caption(document) for document in documents], args.sheet)
    return told


def _write_documents(made: list, documents: list, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes interleaved documents: a file a span and ``index.html`` in a folder, or one page."""
    from omnimoe.generation.pages import write_page, write_spans

    prompts = [document for document in documents for _ in range(args.num)]
    title = f"omnimoe generate --model {args.model} --to any"
    if args.out.suffix.lower() in PAGES:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            files = [write_spans(spans, Path(folder), str(number)) for number, spans in enumerate(made, 1)]
            write_page(made, files, prompts, args.out, title=title)
        files = [[args.out] * len(spans) for spans in made]
    else:
        files = [write_spans(spans, args.out, str(number)) for number, spans in enumerate(made, 1)]
        write_page(made, files, prompts, args.out / "index.html", title=title)
    told = []
    for number, (spans, written) in enumerate(zip(made, files, strict=True)):
        for found, file in zip(spans, written, strict=True):
            sample = {"prompt": number // args.num + 1, "modality": found.modality, "num_tokens": len(found)}
            sample |= {"text": found.raw} if isinstance(found.raw, str) else {}
            told.append({**sample, "file": str(file)})
    return told


def _caption(document: list[tuple[str, Any]]) -> str:
    """A document in words: its text, or what else it holds."""
    words = [raw if modality == "text" else f"({modality})" for modality, raw in document]
    return " ".join(words) or "(no prompt)"


def _tell(told: list[dict[str, Any]], args: argparse.Namespace, *, is_streamed: bool) -> None:
    page = args.out / "index.html" if args.to == ANY and args.out.is_dir() else args.out if args.to == ANY else None
    if args.json:
        found = {"model": args.model, "to": args.to, "seed": args.seed, "samples": told}
        found |= {} if args.sheet is None else {"sheet": str(args.sheet)}
        print(json.dumps({**found, **({} if page is None else {"page": str(page)})}))
        return
    for sample in told:
        if "text" in sample and not is_streamed:
            print(sample["text"])
        if "file" in sample and page is None:
            print(f"wrote {sample['file']}")
    if page is not None:
        spans = ", ".join(f"{sample['modality']} ({sample['num_tokens']} tokens)" for sample in told) or "nothing"
        print(f"wrote {spans}; all in order in {page}")
    if args.sheet is not None:
        print(f"wrote {args.sheet}")
