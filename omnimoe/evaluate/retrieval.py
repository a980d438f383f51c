"""The right one among wrong ones, by likelihood, in every direction between modalities."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from omnimoe.data.corpus import Example
from omnimoe.evaluate.base import EvaluationError, Measure, NotRunError, register_metric
from omnimoe.evaluate.bench import Bench
from omnimoe.evaluate.likelihood import Document, log_likelihoods
from omnimoe.evaluate.statistics import wilson
from omnimoe.model import OmniMoeForCausalLM

Scorer = Callable[[Sequence[Document]], tuple[np.ndarray, np.ndarray]]
"""Documents to log-probabilities ``(n,)`` in nats and tokens ``(n,)``."""

SHOWN = 8
"""Queries on a contact sheet."""


@register_metric("retrieval")
def retrieval(bench: Bench) -> Iterator[Measure]:
    """The right one among wrong ones by likelihood: a picture for a caption, a caption for a clip, and so on.

    The wrong ones are of other concepts of the split. Candidates x of a query c are ranked by log p(x|c), by the same
    per token, and by log p(x|c) - log p(x), which asks how much c tells of x.
    """
    measured = False
    for of, model in bench.models.items():
        if not model.config.is_causal:
            bench.note(f"{of} sees later tokens when it scores, so what it ranks by is no likelihood.")
        for given, target in itertools.permutations(bench.modalities(model), 2):
            try:
                every = bench.concepts(given, target, num=None)
            except EvaluationError as error:
                bench.note(f"{error}.")
                continue
            sizes = [size for size in bench.candidates if size <= len(every)]
            if len(sizes) < len(bench.candidates):
                bench.note(
                    f"Split {bench.split} has {len(every)} concepts with {given} and {target}, too few to choose among "
                    f"{max(bench.candidates)}; lower --candidates."
                )
            if sizes:
                measured = True
                yield from _direction(bench, of, model, every, given, target, sizes)
    if not measured:
        raise NotRunError(" ".join(bench.notes))


def _direction(
    bench: Bench,
    of: str,
    model: OmniMoeForCausalLM,
    every: Sequence[Example],
    given: str,
    target: str,
    sizes: Sequence[int],
) -> Iterator[Measure]:
    num = len(every) if bench.num is None else min(bench.num, len(every))
    picks = np.array([[i, *bench.wrong_ones(i, len(every), max(sizes) - 1)] for i in range(num)], dtype=np.int64)
    bar = functools.partial(bench.progress, what=f"{of}: {given} -> {target}")
    scorer = functools.partial(log_likelihoods, model, bench.corpus, batch_size=bench.batch_size, progress=bar)
    scores = candidate_scores(scorer, every, picks, given, target)
    if model.config.token_ranges[target].num_tokens is not None:
        # all are equally long, so dividing by the length changes no rank
        del scores["per token"]
    for (form, values), size in itertools.product(scores.items(), sizes):
        is_detail = form == "per token" or size != min(sizes)
        yield share_right(of, f"{given} -> {target}, 1 of {size}, {form}", values[:, :size], detail=is_detail)
    if (given, target) == ("text", "image"):
        _sheet(bench, of, every, picks[:, : min(sizes)], scores["gain"])


def candidate_scores(
    scorer: Scorer, examples: Sequence[Example], picks: np.ndarray, given: str, target: str
) -> dict[str, np.ndarray]:
    """Scores of every candidate for every query, in each form.

    Args:
        scorer: of documents.
        examples: concepts, one row each.
        picks: ``(n, k)`` int64: the query is the ``given`` of the first, the candidates are the ``target`` of each.
        given: modality of the query.
        target: modality of the candidates.

    Returns:
        Form to ``(n, k)`` float64: ``"likelihood"``, ``"per token"`` and ``"gain"``.
    """
    count, size = picks.shape
    ids = {name: [np.asarray(example.get(name)) for example in examples] for name in (given, target)}
    asked = [(((given, ids[given][row[0]]),), (target, ids[target][other])) for row in picks for other in row]
    used = np.unique(picks)
    found, lengths = scorer([*asked, *(((), (target, ids[target][other])) for other in used)])
    given_query = found[: count * size].reshape(count, size)
    given_nothing = dict(zip(used.tolist(), found[count * size :].tolist(), strict=True))
    prior = np.array([[given_nothing[other] for other in row] for row in picks.tolist()])
    return {
        "likelihood": given_query,
        "per token": given_query / lengths[: count * size].reshape(count, size),
        "gain": given_query - prior,
    }


def share_right(of: str, name: str, scores: np.ndarray, *, detail: bool = False) -> Measure:
    """How often the first of k candidates scores best, ``(n, k)``, with Wilson's interval and chance."""
    won = wins(scores)
    low, high = wilson(float(won.sum()), len(won))
    return Measure(
        of=of,
        name=name,
        value=float(won.mean()),
        unit="share",
        better="higher",
        low=low,
        high=high,
        chance=1 / scores.shape[1],
        count=len(won),
        detail=detail,
    )


def wins(scores: np.ndarray) -> np.ndarray:
    """Whether the first candidate scores best, ``(n, k)`` to ``(n,)``; one that shares the top with m others counts
    1 / (m + 1), so that a scorer that tells nothing apart is right as often as chance.

    Example:
        >>> wins(np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])).tolist()
        [1.0, 0.0, 0.5]
    """
    is_best = scores == scores.max(axis=1, keepdims=True)
    return is_best[:, 0] / is_best.sum(axis=1)


def _sheet(bench: Bench, of: str, examples: Sequence[Example], picks: np.ndarray, scores: np.ndarray) -> None:
    from omnimoe.plots import draw_grid

    size = picks.shape[1]
    lines, headings = [], []
    for row, values in list(zip(picks, scores[:, :size], strict=True))[:SHOWN]:
        order = np.argsort(-values, kind="stable")
        lines.append([_framed(bench.decoded(examples[row[place]]), is_right=place == 0) for place in order])
        headings.append(bench.caption(examples[row[0]]))
    bench.sheet(
        f"retrieval-{of}",
        f"{of}: pictures ranked for a caption, the model's first choice on the left, the right one framed",
        lambda path: draw_grid(lines, path, headings=headings, captions=[f"choice {i + 1}" for i in range(size)]),
    )


def _framed(picture: np.ndarray, *, is_right: bool, width: int = 3) -> np.ndarray:
    framed = np.full((picture.shape[0] + 2 * width, picture.shape[1] + 2 * width, 3), 255, np.uint8)
    if is_right:
        framed[:] = (47, 143, 91)
    framed[width:-width, width:-width] = picture
    return framed
