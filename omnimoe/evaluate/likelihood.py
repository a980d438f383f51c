"""How likely a model holds one span after others, many documents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from omnimoe.data import Corpus
from omnimoe.data.documents import DocumentBuilder, Piece, collate, lay_out
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.spans import position_axes
from omnimoe.train.data import check_ranges

Span = tuple[str, np.ndarray]
"""A modality and local ids ``(n,)``."""
Document = tuple[tuple[Span, ...], Span]
"""What is given, in order, and the span to score."""

LENGTH = 256
"""Tokens of a packed sequence, where no document is longer."""


@torch.no_grad()
def log_likelihoods(
    model: OmniMoeForCausalLM,
    corpus: Corpus,
    documents: Sequence[Document],
    *,
    batch_size: int = 16,
    progress: Callable[[Any], Iterable[Any]] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of the last span of each document, given those before it.

    A document is laid out as in training, ``<bos> given ... target <eos>``. Of the target its own tokens count, and of
    a modality of free length the token that ends it too, without which a text would never be less likely than a longer
    one that begins with it. Equal documents are computed once, and documents are packed into sequences.

    Args:
        model: in evaluation mode. Where its tokens see later ones (``config.is_causal`` is False) the numbers are no
            probabilities.
        corpus: gives the sizes of the vocabularies and the layout of pictures.
        documents: what is given, which may be nothing, and the target.
        batch_size: sequences at once.
        progress: wraps the batches, for a bar.

    Returns:
        ``(n,)`` float64 log-probabilities in nats, and ``(n,)`` int64 tokens that they are over.

    Raises:
        DataMismatchError: if the corpus does not fit the model.
        SequenceError: if a document has a modality that the model lacks.
    """
    ranges = check_ranges(model.config, corpus)
    builder = DocumentBuilder(corpus, ranges, tuple(ranges))
    number: dict[Any, int] = {}
    pieces: list[Piece] = []
    targets: list[slice] = []
    which = np.empty(len(documents), dtype=np.int64)
    for i, (given, (name, ids)) in enumerate(documents):
        key = tuple((held, span.tobytes()) for held, span in (*given, (name, ids)))
        if key not in number:
            number[key] = len(pieces)
            piece = lay_out(
                [*given, (name, ids)], ranges, bos_id=builder.bos_id, eos_id=builder.eos_id, grids=corpus.grids
            )
            has_marker = ranges[name].end_id is not None
            stop = len(piece) - 1 - has_marker
            is_free = ranges[name].num_tokens is None
            pieces.append(piece)
            targets.append(slice(stop - len(ids), stop + is_free))
        which[i] = number[key]
    found = np.zeros(len(pieces))
    sequences = _packed(pieces, length := max([LENGTH, *map(len, pieces)]))
    axes = axes_of(model)
    device = next(model.parameters()).device
    for start in progress(range(0, len(sequences), batch_size)):
        part = sequences[start : start + batch_size]
        batch = collate([[pieces[i] for i in sequence] for sequence in part], builder, length, axes)
        # modality ids are left to the partition, since the corpus numbers its own
        inputs = {key: value.to(device) for key, value in batch.items() if key != "modality_ids"}
        losses = model(**inputs).token_losses.double().cpu().numpy()
        for row, sequence in enumerate(part):
            at = 0
            for i in sequence:
                found[i] = -losses[row, at + targets[i].start : at + targets[i].stop].sum()
                at += len(pieces[i])
    counts = np.array([target.stop - target.start for target in targets], dtype=np.int64)
    return found[which], counts[which]


def axes_of(model: OmniMoeForCausalLM) -> int:
    """Position axes that a model is trained with: 3, or 1."""
    return 3 if position_axes(model.config) == 3 else 1


def _packed(pieces: Sequence[Piece], length: int) -> list[list[int]]:
    """Pieces by number, in sequences of at most ``length`` tokens; long ones first, so that short ones fill gaps."""
    sequences: list[list[int]] = []
    room: list[int] = []
    first = 0
    for i in sorted(range(len(pieces)), key=lambda i: -len(pieces[i])):
        # only the last few are looked at, which keeps this linear and fills nearly as well
        fits = (k for k in range(first, len(sequences)) if room[k] >= len(pieces[i]))
        k = next(fits, None)
        if k is None:
            sequences.append([])
            room.append(length)
            k = len(sequences) - 1
            first = max(first, k - 64)
        sequences[k].append(i)
        room[k] -= len(pieces[i])
    return sequences
