"""Batches for a model: the corpus laid out in the model's own vocabulary."""

from __future__ import annotations

from torch import Tensor

from omnimoe.data import Corpus, PackedSequences
from omnimoe.model import OmniMoeConfig
from omnimoe.modalities import TokenRange
from omnimoe.train.settings import TrainSettings

Batch = dict[str, Tensor]

HELD_OUT_SEED = 7


class DataMismatchError(ValueError):
    """A corpus whose codes do not fit the model's vocabulary."""


def check_ranges(config: OmniMoeConfig, corpus: Corpus) -> dict[str, TokenRange]:
    """The model's ranges, if the corpus fits into them.

    Raises:
        DataMismatchError: if a modality of the corpus is larger than the model's, or the model has another kind of it.
    """
    ranges = {name: held for name, held in config.token_ranges.items() if name in corpus.vocab_sizes}
    if "text" not in ranges:
        raise DataMismatchError(f"the corpus tells rows with text, but the model's modalities are {config.modality_names}")
    for name, held in ranges.items():
        size = corpus.vocab_sizes[name]
        if held.size < size:
            raise DataMismatchError(
                f"corpus {corpus.name!r} has {size} codes of {name}, the model {held.size}; "
                "take a model made for this corpus, such as mot_nano, or set the modality's vocab_size"
            )
        if name != "text" and (held.begin_id is None or held.end_id is None):
            raise DataMismatchError(f"modality {name!r} of the model has no begin_id and end_id to set off its spans")
    return ranges


def training_batches(config: OmniMoeConfig, settings: TrainSettings, corpus: Corpus) -> PackedSequences:
    """Endless packed batches of the training split, in an order that the seed alone decides."""
    ranges = check_ranges(config, corpus)
    return PackedSequences(
        corpus,
        ranges,
        sequence_length=settings.sequence_length,
        batch_size=settings.batch_size,
        seed=settings.seed,
        modalities=tuple(ranges),
        text_share=settings.text_share,
        axes=1,
    )


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
    ranges = check_ranges(config, corpus)
    batches = PackedSequences(
        corpus,
        ranges,
        sequence_length=settings.sequence_length,
        batch_size=settings.batch_size,
        split=split,
        seed=HELD_OUT_SEED,
        modalities=tuple(ranges),
        text_share=settings.text_share,
        axes=1,
    )
    return [next(batches) for _ in range(settings.evaluate_batches if count is None else count)]
