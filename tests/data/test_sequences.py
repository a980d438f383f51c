"""Packed sequences of the shipped corpus: whole spans, labels, positions, determinism, exact resumption, refusals."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from omnimoe.data import Corpus, PackedSequences, SequenceError, default_ranges, evaluation_batches
from omnimoe.data.documents import DocumentBuilder
from omnimoe.modalities.vocabulary import TokenRange
from omnimoe.tokenizers.text import BOS_ID, EOS_ID

LENGTH = 256


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load("p")


@pytest.fixture(scope="module")
def ranges(corpus: Corpus) -> dict[str, TokenRange]:
    return default_ranges(corpus)


def packed(corpus: Corpus, ranges: dict[str, TokenRange], **changes: object) -> PackedSequences:
    arguments = {"sequence_length": LENGTH, "batch_size": 4, **changes}
    return PackedSequences(corpus, ranges, **arguments)  # type: ignore[arg-type]


def segments(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The segments of a batch, each as the slices of all its tensors."""
    found = []
    for row in range(len(batch["input_ids"])):
        numbers = batch["segment_ids"][row]
        for number in range(int(numbers.max()) + 1):
            at = numbers == number
            found.append({key: value[row][at] for key, value in batch.items()})
    return found


def told_order(segment: dict[str, Tensor]) -> tuple[str, ...]:
    """The modalities of a document in order; a run of text that is markers alone is no span."""
    order: list[str] = []
    for number, token in zip(segment["modality_ids"].tolist(), segment["input_ids"].tolist(), strict=True):
        name = ("text", "image", "speech")[number]
        if (number or token >= 16) and order[-1:] != [name]:
            order.append(name)
    return tuple(order)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def test_the_usual_ranges(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    assert list(ranges) == ["text", "image", "speech"]
    assert ranges["text"].start == 0
    assert ranges["image"].start == 2048
    assert ranges["speech"].start == ranges["image"].stop
    assert (ranges["image"].begin_id, ranges["image"].end_id, ranges["image"].num_tokens) == (3, 4, 64)
    assert (ranges["speech"].begin_id, ranges["speech"].end_id, ranges["speech"].num_tokens) == (5, 6, None)
    assert default_ranges() == ranges
    assert list(default_ranges(corpus, ("speech", "text"))) == ["text", "speech"]


def test_shapes_types_and_no_padding(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batch = next(packed(corpus, ranges))
    for key in ("input_ids", "labels", "modality_ids", "segment_ids"):
        assert batch[key].shape == (4, LENGTH)
        assert batch[key].dtype == torch.int64
    assert batch["position_ids"].shape == (4, LENGTH, 3)
    assert (batch["segment_ids"] >= 0).all()
    one = next(packed(corpus, ranges, axes=1))
    assert one["position_ids"].equal(batch["position_ids"][..., 0])


def test_each_token_is_in_the_range_of_its_modality(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batches = packed(corpus, ranges)
    for batch in itertools.islice(batches, 8):
        for number, token_range in enumerate(ranges.values()):
            ids = batch["input_ids"][batch["modality_ids"] == number]
            assert len(ids)
            assert ((ids >= token_range.start) & (ids < token_range.stop)).all()


def test_spans_are_whole_and_marked(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batches = packed(corpus, ranges)
    told = Counter()
    for segment in itertools.chain.from_iterable(segments(next(batches)) for _ in range(60)):
        ids, numbers = segment["input_ids"], segment["modality_ids"]
        for number, name in ((1, "image"), (2, "speech")):
            begin, end = ranges[name].begin_id, ranges[name].end_id
            assert (ids == begin).sum() == (ids == end).sum()
            for start in (ids == begin).nonzero().flatten().tolist():
                stop = start + (ids[start:] == end).nonzero()[0, 0].item()
                assert (numbers[start + 1 : stop] == number).all()
                assert numbers[start] == numbers[stop] == 0
                assert name == "speech" or stop - start == 65
        if (numbers > 0).any():
            assert ids[0] == BOS_ID
            assert ids[-1] == EOS_ID
            told[told_order(segment)] += 1
    pairs_and_triples = [order for n in (2, 3) for order in itertools.permutations(ranges, n)]
    assert set(told) == set(pairs_and_triples)
    # Words are spoken and not drawn, so those two orders come more often.
    drawn = [count for order, count in told.items() if "image" in order]
    assert min(drawn) > 0.3 * max(drawn)
    assert 0.5 < told["text", "speech"] / told["speech", "text"] < 2


def test_every_order_of_a_row_makes_a_document(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    builder = DocumentBuilder(corpus, ranges)
    row = corpus[int(corpus.select("train", having=("image", "speech"))[0])]
    orders = builder.orders(row, LENGTH)
    assert len(orders) == len(set(orders)) == 12
    for order in orders:
        piece = builder.document(row, order)
        assert piece.ids[0] == BOS_ID
        assert piece.ids[-1] == EOS_ID
        segment = {"input_ids": torch.from_numpy(piece.ids), "modality_ids": torch.from_numpy(piece.modality_ids)}
        assert told_order(segment) == order


def test_labels_are_unshifted_and_stop_at_documents(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batch = next(packed(corpus, ranges))
    starts = torch.ones_like(batch["segment_ids"], dtype=torch.bool)
    starts[:, 1:] = batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1]
    assert (batch["labels"][starts] == -100).all()
    assert batch["labels"][~starts].equal(batch["input_ids"][~starts])


def test_positions(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batches = packed(corpus, ranges)
    pictures = 0
    for segment in itertools.chain.from_iterable(segments(next(batches)) for _ in range(5)):
        time, row, column = segment["position_ids"].unbind(-1)
        assert time.equal(torch.arange(len(time)))
        flat = segment["modality_ids"] != 1
        assert row[flat].equal(time[flat])
        assert column[flat].equal(time[flat])
        for start in (segment["input_ids"] == ranges["image"].begin_id).nonzero().flatten().tolist():
            cells, first = slice(start + 1, start + 65), start + 1
            assert row[cells].equal(first + torch.arange(64) // 8)
            assert column[cells].equal(first + torch.arange(64) % 8)
            pictures += 1
    assert pictures > 10


def test_ids_round_trip_to_the_corpus(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    known = {row.tobytes() for row in corpus.images}
    batches = packed(corpus, ranges)
    for segment in itertools.chain.from_iterable(segments(next(batches)) for _ in range(5)):
        image = segment["input_ids"][segment["modality_ids"] == 1] - ranges["image"].start
        assert not len(image) or image.numpy().tobytes() in known


def test_same_seed_same_batches_other_seed_others(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    first, second, third = packed(corpus, ranges), packed(corpus, ranges), packed(corpus, ranges, seed=1)
    for _ in range(3):
        batch = next(first)
        assert equal(batch, next(second))
        assert not equal(batch, next(third))


@pytest.mark.parametrize("changes", [{}, {"modalities": ("text",)}, {"split": "drawing"}, {"sequence_length": 64}])
def test_resuming_is_exact(corpus: Corpus, ranges: dict[str, TokenRange], changes: dict) -> None:
    running = packed(corpus, ranges, **changes)
    # More than an epoch of the small split, so that the state is also taken after one has ended.
    for _ in range(60 if changes.get("split") == "drawing" else 7):
        next(running)
    state = json.loads(json.dumps(running.state_dict()))
    resumed = packed(corpus, ranges, **changes)
    resumed.load_state_dict(state)
    assert resumed.epoch == running.epoch
    for _ in range(12):
        assert equal(next(running), next(resumed))


def test_an_epoch_tells_every_row_once(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batches = packed(corpus, ranges, split="drawing", batch_size=1)
    documents: list[dict[str, Tensor]] = []
    while batches.epoch < 1:
        documents += segments(next(batches))
    rows = len(corpus.select("drawing"))
    # The last sequence may hold the first documents of the next epoch.
    assert rows <= len(documents) < rows + 20
    assert all(document["input_ids"][0] == BOS_ID for document in documents)


def test_share_of_running_text(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    for share in (0.2, 0.6):
        batches = packed(corpus, ranges, text_share=share)
        taken = [segment for _ in range(30) for segment in segments(next(batches))]
        text = sum(len(s["input_ids"]) for s in taken if not (s["modality_ids"] > 0).any())
        assert text / (30 * 4 * LENGTH) == pytest.approx(max(share, 0.2), abs=0.1)


def test_processes_take_disjoint_rows(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    parts = [packed(corpus, ranges, rank=rank, world_size=3) for rank in range(3)]
    rows = [set(part._rows.tolist()) for part in parts]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(packed(corpus, ranges)._rows)
    assert not equal(next(parts[0]), next(parts[1]))


def test_fewer_modalities(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batch = next(packed(corpus, ranges, modalities=("text", "image")))
    assert set(batch["modality_ids"].unique().tolist()) == {0, 1}
    # Without text there is nothing to cut, so gaps are padding.
    batch = next(packed(corpus, ranges, modalities=("image", "speech")))
    padding = batch["segment_ids"] == -1
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == 0).all()


def test_a_shifted_vocabulary_moves_every_id(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    def moved(r: TokenRange) -> TokenRange:
        return replace(
            r, start=r.start + 100, begin_id=r.begin_id and r.begin_id + 100, end_id=r.end_id and r.end_id + 100
        )

    here, there = packed(corpus, ranges), packed(corpus, {name: moved(r) for name, r in ranges.items()})
    assert (next(here)["input_ids"] + 100).equal(next(there)["input_ids"])


def test_evaluation_takes_each_document_once(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batches = list(evaluation_batches(corpus, ranges, sequence_length=LENGTH, batch_size=4, split="test"))
    again = evaluation_batches(corpus, ranges, sequence_length=LENGTH, batch_size=4, split="test")
    assert all(equal(first, second) for first, second in zip(batches, again, strict=True))
    ids = torch.cat([batch["input_ids"][batch["segment_ids"] >= 0] for batch in batches])
    texts = corpus.documents["text"][corpus.select_documents("test")]
    assert (ids == BOS_ID).sum() == len(corpus.select("test")) + len(texts)
    assert (ids == BOS_ID).sum() == (ids == EOS_ID).sum()
    assert all(len(batch["input_ids"]) == 4 for batch in batches[:-1])


def test_evaluation_in_one_order(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    batches = evaluation_batches(
        corpus, ranges, sequence_length=LENGTH, batch_size=4, order=("image", "text"), running_text=False, max_batches=3
    )
    batches = list(batches)
    assert len(batches) == 3
    for segment in itertools.chain.from_iterable(map(segments, batches)):
        assert segment["input_ids"][1] == ranges["image"].begin_id
        assert segment["input_ids"][66] == ranges["image"].end_id
        assert segment["input_ids"][-1] == EOS_ID


def test_nothing_of_test_comes_from_train(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    train = {corpus.images[i].tobytes() for i in np.unique(corpus.rows["image"][corpus.select("train")])}
    batch = next(iter(evaluation_batches(corpus, ranges, sequence_length=LENGTH, batch_size=8, split="test")))
    held = [s["input_ids"][s["modality_ids"] == 1] - ranges["image"].start for s in segments(batch)]
    # Two drawings can share all their codes; the pictures themselves are held apart by the builder.
    seen = sum(ids.numpy().tobytes() in train for ids in held if len(ids))
    assert seen <= len(held) // 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 4}, "at least 8, got 4"),
        ({"sequence_length": 10.0}, "at least 8, got 10.0"),
        ({"batch_size": 0}, "positive integer, got 0"),
        ({"axes": 2}, "must be 1 or 3, got 2"),
        ({"text_share": 1.5}, r"0..1, got 1.5"),
        ({"rank": 2, "world_size": 2}, "got rank 2 of 2"),
        ({"modalities": ("text", "video")}, "must be some of text, image, speech"),
        ({"modalities": ()}, "must be some of"),
        ({"modalities": ("image",), "sequence_length": 16}, "nothing of image that fits 16 tokens"),
    ],
)
def test_bad_arguments_are_refused(corpus: Corpus, ranges: dict[str, TokenRange], changes: dict, message: str) -> None:
    with pytest.raises(SequenceError, match=message):
        packed(corpus, ranges, **changes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image", {"size": 10}, "has 10 rows, the corpus uses"),
        ("image", {"start": 100}, "ranges overlap: text ends at 2048, image starts at 100"),
        ("speech", {"begin_id": None}, "no begin_id"),
    ],
)
def test_bad_ranges_are_refused(
    corpus: Corpus, ranges: dict[str, TokenRange], name: str, change: dict, message: str
) -> None:
    with pytest.raises(SequenceError, match=message):
        packed(corpus, {**ranges, name: replace(ranges[name], **change)})
    with pytest.raises(SequenceError, match="ranges have no"):
        packed(corpus, {key: value for key, value in ranges.items() if key != name})


def test_a_state_of_another_iteration_is_refused(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    state = packed(corpus, ranges, seed=3).state_dict()
    with pytest.raises(SequenceError, match="seed was 3 and is 0"):
        packed(corpus, ranges).load_state_dict(state)
    with pytest.raises(SequenceError, match="no state of PackedSequences"):
        packed(corpus, ranges).load_state_dict({"step": 3})


def test_bad_evaluation_is_refused_at_once(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    with pytest.raises(SequenceError, match="order must name"):
        evaluation_batches(corpus, ranges, sequence_length=LENGTH, batch_size=4, order=("image", "video"))
    with pytest.raises(SequenceError, match="has nothing of image, speech that fits 32"):
        evaluation_batches(
            corpus, ranges, sequence_length=32, batch_size=4, order=("image", "speech"), running_text=False
        )
