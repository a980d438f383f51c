"""Batches for a model: the corpus laid out in the model's own vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from omnimoe.data import Corpus, PackedSequences
from omnimoe.modalities import TokenRange
from omnimoe.model import OmniMoeConfig
from omnimoe.spans import position_axes
from omnimoe.tokenizers.text import SPECIAL_TOKENS
from omnimoe.train.settings import TrainSettings

Batch = dict[str, Tensor]

HELD_OUT_SEED = 7


class DataMismatchError(ValueError):
    """A corpus whose codes do not fit the model's vocabulary."""


class ModelBatches(PackedSequences):
    """Packed batches in the vocabulary of a model, modality ids as the model itself reads them off the ids.

    Args:
        config: the model's.
        settings: give lengths, the share of text and, for the training split, templates.
        corpus: the corpus.
        split: of it.
        seed: of the order.

    Raises:
        DataMismatchError: if corpus and model do not fit.
    """

    def __init__(
        self, config: OmniMoeConfig, settings: TrainSettings, corpus: Corpus, *, split: str, seed: int
    ) -> None:
        ranges = check_ranges(config, corpus)
        super().__init__(
            corpus,
            ranges,
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            split=split,
            seed=seed,
            modalities=tuple(ranges),
            text_share=settings.text_share,
            templates=settings.mixture if split == "train" else None,
            axes=3 if position_axes(config) == 3 else 1,
        )
        self._modality_of_ids = config.modality_of_ids()

    def __next__(self) -> Batch:
        batch = super().__next__()
        # the corpus numbers its own modalities, and a model may have others between them or own its markers
        return {**batch, "modality_ids": self._modality_of_ids[batch["input_ids"]]}


def check_ranges(config: OmniMoeConfig, corpus: Corpus) -> dict[str, TokenRange]:
    """The model's ranges, if the corpus fits into them. Modalities that the model lacks are left out.

    Raises:
        DataMismatchError: if a modality of the corpus is larger than the model's, the model has another kind of it, or
            its markers are ids that the corpus uses for text.
    """
    ranges = {name: held for name, held in config.token_ranges.items() if name in corpus.vocab_sizes}
    if "text" not in ranges:
        raise DataMismatchError(
            f"the corpus tells rows with text, but the model's modalities are {config.modality_names}"
        )
    continuous = [name for name in config.modality_names if name in corpus.vocab_sizes and name not in ranges]
    if continuous:
        raise DataMismatchError(
            f"modality {continuous[0]!r} is continuous in the model, but corpus {corpus.name!r} holds codes of it; "
            "declare it with Tokens.Config, or feed the model's features in a loop of your own"
        )
    text = ranges["text"].start
    words = range(text + len(SPECIAL_TOKENS), text + corpus.vocab_sizes["text"])
    for name, held in ranges.items():
        size = corpus.vocab_sizes[name]
        if held.size < size:
            raise DataMismatchError(
                f"corpus {corpus.name!r} has {size} codes of {name}, the model {held.size}; "
                "take a model made for this corpus, such as mot_nano, or set the modality's vocab_size"
            )
        if name != "text" and (held.begin_id is None or held.end_id is None):
            raise DataMismatchError(f"modality {name!r} of the model has no begin_id and end_id to set off its spans")
        if held.begin_id in words or held.end_id in words:
            raise DataMismatchError(
                f"the markers of {name!r}, {held.begin_id} and {held.end_id}, are words in corpus {corpus.name!r}; its "
                f"special tokens are {text} to {words.start - 1}: {', '.join(SPECIAL_TOKENS)}"
            )
    return ranges


def add_noise(batch: Batch, config: OmniMoeConfig, shares: Mapping[str, float]) -> Batch:
    """The batch with some input tokens replaced by others of their modality, drawn from PyTorch's global generator.

    Args:
        batch: with ``input_ids`` and ``modality_ids``, ``(B, T)`` each; labels and markers stay as they are.
        config: gives the ranges of the modalities.
        shares: modality to the chance of each of its tokens.

    Raises:
        DataMismatchError: if the model has no such modality, or it is continuous.
    """
    ids = batch["input_ids"]
    for name, share in shares.items():
        if name not in config.token_ranges:
            raise DataMismatchError(
                f"noise is for {name!r}, but the model's tokens are {', '.join(config.token_ranges)}"
            )
        held = config.token_ranges[name]
        markers = len(SPECIAL_TOKENS) if name == "text" else 0
        first = held.start + markers
        is_own = (ids >= first) & (ids < held.start + held.size)
        drawn = torch.randint(first, held.start + held.size, ids.shape).to(ids.device)
        ids = torch.where(is_own & (torch.rand(ids.shape) < share).to(ids.device), drawn, ids)
    return {**batch, "input_ids": ids}


def training_batches(config: OmniMoeConfig, settings: TrainSettings, corpus: Corpus) -> PackedSequences:
    """Endless packed batches of the training split, in an order that the seed alone decides."""
    return ModelBatches(config, settings, corpus, split="train", seed=settings.seed)


def held_out_batches(
    config: OmniMoeConfig, settings: TrainSettings, corpus: Corpus, *, split: str = "val", count: int | None = None
) -> list[Batch]:
    """The same few batches of a held-out split every time, for any model that shares the vocabulary.

    Args:
        config: the model's.
        settings: gives the sequence length and the batch size.
        corpus: the corpus.
        split: ``"val"`` or ``"test"``.
        count: batches; ``settings.evaluate_batches`` where None.
    """
    count = settings.evaluate_batches if count is None else count
    if not count:
        return []  # a corpus of one's own may have nothing held out
    batches = ModelBatches(config, settings, corpus, split=split, seed=HELD_OUT_SEED)
    return [next(batches) for _ in range(count)]
