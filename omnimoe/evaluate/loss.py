"""Held-out loss, by modality and by direction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from omnimoe.data import Corpus, evaluation_batches
from omnimoe.data.corpus import MODALITIES
from omnimoe.data.splits import SPLITS
from omnimoe.evaluate.base import EvaluationError, Measure, register_metric
from omnimoe.evaluate.bench import Bench
from omnimoe.evaluate.likelihood import LENGTH, axes_of
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers.text import SPECIAL_TOKENS
from omnimoe.train.data import check_ranges
from omnimoe.train.evaluation import evaluate as mean_losses

RUNNING_TOKENS = 200
"""Tokens of running text for each concept that is used."""


@register_metric("loss")
def loss(bench: Bench) -> Iterator[Measure]:
    """Held-out loss of the next token: in documents as training has them, and by direction.

    Directions are over documents of two spans. Only the words, codes or units of the second span count, not its
    boundary tokens; what comes first is the loss given nothing.
    """
    rows = _rows(bench)
    mixed = _interleaved(bench)
    for of, model in bench.models.items():
        if not model.config.is_causal:
            bench.note(f"{of} sees later tokens when it scores, so its losses are not those of a generator.")
        if len(rows):
            yield from _mixed(bench, of, model, bench.subset(rows), "any order")
            yield from _directions(bench, of, model, rows)
        if mixed is not None:
            yield from _mixed(bench, of, model, mixed, "interleaved")
        yield from _running(bench, of, model)


def _rows(bench: Bench) -> np.ndarray:
    """All rows of the chosen concepts: of those with every modality of the split, if there are such."""
    rows = bench.rows()
    present = [name for name in MODALITIES if len(bench.rows(name))]
    whole = len(bench.rows(*present)) > 0
    try:
        groups = [example.group for example in bench.concepts(*(present if whole else ["text"]))]
    except EvaluationError:
        if bench.corpus.interleaved is None:
            raise
        return np.zeros(0, np.int64)
    return rows[np.isin(bench.corpus.rows["group"][rows], groups)]


def _batches(bench: Bench, model: OmniMoeForCausalLM, corpus: Corpus, **options):
    ranges = check_ranges(model.config, corpus)
    longest = max([LENGTH, *(8 + bench.length(corpus[row]) for row in range(len(corpus)))])
    batches = evaluation_batches(
        corpus,
        ranges,
        sequence_length=min(longest, bench.longest),
        batch_size=bench.batch_size,
        split=bench.split,
        seed=bench.seed,
        modalities=tuple(ranges),
        axes=axes_of(model),
        **options,
    )
    # modality ids are left to the partition, since the corpus numbers its own
    return ({key: value for key, value in batch.items() if key != "modality_ids"} for batch in batches)


def _interleaved(bench: Bench) -> Corpus | None:
    """The corpus with some of its interleaved documents only; None where the split has none."""
    held = bench.corpus.interleaved
    number = SPLITS.index(bench.split)
    found = np.flatnonzero(held.splits == number) if held is not None else np.zeros(0, np.int64)
    if held is None or not len(found):
        return None
    chosen = np.random.default_rng([bench.seed, 5]).permutation(found)[: bench.num]
    # no split has this number, so the others are not told
    splits = np.full_like(held.splits, -1)
    splits[chosen] = number
    return replace(bench.subset(()), interleaved=replace(held, splits=splits))


def _mixed(bench: Bench, of: str, model: OmniMoeForCausalLM, corpus: Corpus, kind: str) -> Iterator[Measure]:
    found = mean_losses(model, _batches(bench, model, corpus, running_text=False))
    sizes = {held.name: model.config.token_ranges[held.name].size for held in model.config.modalities}
    for name, value in found.items():
        chance = math.log(sizes[name]) if name in sizes else None
        named = f"{'all tokens' if name == 'all' else name}, {kind}"
        yield Measure(of=of, name=named, value=value, unit="nats/token", better="lower", chance=chance)


def _directions(bench: Bench, of: str, model: OmniMoeForCausalLM, rows: np.ndarray) -> Iterator[Measure]:
    totals: dict[tuple[str, str], tuple[float, int]] = {}
    pairs = list(itertools.permutations(bench.modalities(model), 2))
    for given, target in bench.progress(pairs, f"{of}: loss by direction"):
        having = bench.rows(given, target)
        chosen = bench.subset(np.intersect1d(rows, having))
        if len(chosen):
            batches = _batches(bench, model, chosen, order=(given, target), running_text=False)
            for name, (total, count) in span_losses(model, batches).items():
                key = (given if name == target else "", name)
                before = totals.get(key, (0.0, 0))
                totals[key] = before[0] + total, before[1] + count
    for (given, name), (total, count) in sorted(totals.items(), key=lambda item: (item[0][0] == "", item[0])):
        held = model.config.token_ranges[name]
        value, chance = total / count, math.log(held.size)
        row = f"{given} -> {name}" if given else f"nothing -> {name}"
        measure = Measure(of=of, name=row, value=value, unit="nats/token", better="lower", chance=chance, count=count)
        yield measure
        rate, unit = held.num_tokens, "bits/picture"
        if name == "speech":
            rate, unit = bench.corpus.meta.get("units_per_second"), "bits/s"
        if rate:
            scale = float(rate) / math.log(2)
            yield replace(measure, value=value * scale, unit=unit, chance=chance * scale, detail=True)


@torch.no_grad()
def span_losses(model: OmniMoeForCausalLM, batches) -> dict[str, tuple[float, int]]:
    """Sum of the losses of each modality's own tokens, and how many there are; boundary tokens do not count.

    Args:
        model: in evaluation mode.
        batches: inputs of the model with labels.
    """
    table = model.config.modality_of_ids()
    text = model.config.token_ranges["text"].start
    names = model.config.modality_names
    device = next(model.parameters()).device
    totals = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    for batch in batches:
        losses = model(**{name: value.to(device) for name, value in batch.items()}).token_losses.double().cpu()
        labels = batch["labels"]
        is_marker = (labels >= text) & (labels < text + len(SPECIAL_TOKENS))
        kind = table[labels.clamp_min(0)].masked_fill((labels < 0) | is_marker, -1)
        for number, name in enumerate(names):
            chosen = kind == number
            totals[name] += float(losses[chosen].sum())
            counts[name] += int(chosen.sum())
    return {name: (totals[name], counts[name]) for name in names if counts[name]}


def _running(bench: Bench, of: str, model: OmniMoeForCausalLM) -> Iterator[Measure]:
    documents = bench.corpus.select_documents(bench.split)
    if not len(documents):
        bench.note(f"Split {bench.split} has no running text.")
        return
    documents = np.random.default_rng([bench.seed, 3]).permutation(documents)
    if bench.num is not None:
        lengths = bench.corpus.texts.lengths[bench.corpus.documents["text"][documents]]
        documents = documents[: 1 + int(np.searchsorted(lengths.cumsum(), bench.num * RUNNING_TOKENS))]
    found = span_losses(model, _batches(bench, model, bench.subset((), np.sort(documents))))
    total, count = found["text"]
    chance = math.log(model.config.token_ranges["text"].size)
    yield Measure(
        of=of,
        name="running text",
        value=total / count,
        unit="nats/token",
        better="lower",
        chance=chance,
        count=count,
    )
