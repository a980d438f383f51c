"""Interleaved documents as files in order and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from omnimoe.generation.media import Generated
from omnimoe.report import Report

ENDINGS = {"text": ".txt", "image": ".png", "sound": ".wav", "frames": ".gif"}
"""What the file of each kind of output is called."""


def kind_of(made: Generated) -> str:
    """``"text"``, ``"sound"``, ``"frames"`` or ``"image"``, by what it holds."""
    if isinstance(made.raw, str):
        return "text"
    if made.sample_rate is not None:
        return "sound"
    return "frames" if made.raw.ndim == 4 else "image"


def write_spans(spans: Sequence[Generated], folder: Path, stem: str) -> list[Path]:
    """Writes each span to ``stem_01_text.txt``, ``stem_02_image.png`` and so on.

    Returns:
        The files, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [
        made.save(folder / f"{stem}_{number:02d}_{made.modality}{ENDINGS[kind_of(made)]}")
        for number, made in enumerate(spans, 1)
    ]


def write_page(
    documents: Sequence[Sequence[Generated]],
    files: Sequence[Sequence[Path]],
    prompts: Sequence[Sequence[tuple[str, Any]]],
    path: Path,
    *,
    title: str,
) -> Path:
    """Writes documents, spans in order, as one page with pictures and sounds inside it.

    Args:
        documents: spans of each.
        files: what :func:`write_spans` wrote of them.
        prompts: what each continues.
        path: of the page.
        title: of the page.

    Returns:
        The path.
    """
    report = Report(title)
    for number, (spans, written, prompt) in enumerate(zip(documents, files, prompts, strict=True), 1):
        report.heading(f"Document {number}")
        for modality, raw in prompt:
            told = raw if isinstance(raw, str) else f"({modality})"
            report.text(f"given {modality}: {told}", quiet=True)
        if not spans:
            report.text("The model ended the document at once.", quiet=True)
        add_spans(report, spans, written, told="generated ")
    return report.write(path)


def add_spans(report: Report, spans: Sequence[Generated], files: Sequence[Path], *, told: str = "") -> None:
    """Puts the spans of a document, as :func:`write_spans` wrote them, on a page.

    Args:
        report: the page.
        spans: of one document, in order.
        files: of each.
        told: what stands before "image, 64 x 64" where a picture cannot be shown.
    """
    for made, file in zip(spans, files, strict=True):
        kind = kind_of(made)
        if kind == "text":
            report.text(made.raw)
        elif kind == "sound":
            rate = made.sample_rate or 1
            report.sound(file, f"{made.modality}, {len(made.raw) / rate:.1f} s")
        else:
            report.picture(file, f"{told}{made.modality}, {_size(file)}")


def _size(file: Path) -> str:
    with Image.open(file) as picture:
        return f"{picture.width} x {picture.height}"


def inline(made: Generated) -> str:
    """A span as a piece of HTML that holds its picture or sound."""
    kind = kind_of(made)
    if kind == "text":
        return f"<p>{html.escape(made.raw.strip())}</p>"
    with tempfile.TemporaryDirectory() as folder:
        content = base64.b64encode(made.save(Path(folder, f"span{ENDINGS[kind]}")).read_bytes()).decode()
    if kind == "sound":
        return f'<audio controls src="data:audio/wav;base64,{content}"></audio>'
    form = "png" if kind == "image" else "gif"
    return f'<img alt="generated {html.escape(made.modality)}" src="data:image/{form};base64,{content}">'
