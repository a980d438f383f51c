"""Templates: what each one asks, what it teaches, that answers are right, and that the default stays what it was."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from omnimoe.data import Corpus, PackedSequences, SequenceError, default_ranges
from omnimoe.data.corpus import Ragged
from omnimoe.data.documents import DocumentBuilder, Piece
from omnimoe.data.tasks import NUMBERS
from omnimoe.data.templates import TEMPLATES, Scene, Span, Teller, register_template
from omnimoe.modalities.vocabulary import TokenRange
from omnimoe.registry import RegistryError
from omnimoe.tokenizers.base import load_tokenizer

BUILT_IN = (
    *("alone", "caption_first", "continue_it", "count_them", "draw_it", "name_it", "odd_one_out", "say_it"),
    *("tell", "transcribe", "translate", "which_picture", "which_words"),
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    loaded = Corpus.load("p")
    # The concept's number stands in for a topic, so that the test does not hang on the shipped copy having topics.
    return replace(loaded, rows={**loaded.rows, "topic": loaded.rows["group"] % 4})


@pytest.fixture(scope="module")
def ranges(corpus: Corpus) -> dict[str, TokenRange]:
    return default_ranges(corpus)


text_tokenizer = functools.cache(lambda: load_tokenizer("text"))


def teller(corpus: Corpus, ranges: dict[str, TokenRange], *names: str, longest: int = 600, seed: int = 0) -> Teller:
    rows = corpus.select("train")
    return Teller(DocumentBuilder(corpus, ranges), rows, dict.fromkeys(names, 1.0), seed=seed, longest=longest)


def told(piece: Piece, ranges: dict[str, TokenRange]) -> tuple[str, str]:
    """The document in words, pictures as ``[i:digest]`` and clips as ``[s:digest]``; and what of it is learned."""
    tokenizer = text_tokenizer()

    def written(at: np.ndarray) -> str:
        parts = []
        numbers = piece.modality_ids[at]
        edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        for start, end in itertools.pairwise(edges.tolist()):
            ids = piece.ids[at][start:end]
            if numbers[start] == 0:
                parts.append(tokenizer.decode(ids))
            else:
                parts.append(f"[{'_is'[numbers[start]]}:{hashlib.sha1(ids.tobytes()).hexdigest()[:8]}]")
        return "".join(parts)

    assert piece.learned is not None
    return written(np.arange(len(piece))), written(np.flatnonzero(piece.learned))


def scenes(corpus: Corpus, ranges: dict[str, TokenRange], name: str, count: int = 12, **options: int) -> list[tuple]:
    """Row, whole and learned part of some documents of a template."""
    made = teller(corpus, ranges, name, **options)
    rows = corpus.select("train", sources=("emoji",), having=("image", "speech"))
    found = []
    for row in rows[:: len(rows) // (count * 4)].tolist():
        piece = made.piece(row, 0)
        if piece is not None:
            found.append((corpus[row], *told(piece, ranges)))
    assert len(found) >= min(count, 4)
    return found


def text_of(row: object) -> str:
    return text_tokenizer().decode(row.text)  # type: ignore[attr-defined]


def picture_of(row: object, ranges: dict[str, TokenRange]) -> str:
    ids = row.image + ranges["image"].start  # type: ignore[attr-defined]
    return f"[i:{hashlib.sha1(ids.tobytes()).hexdigest()[:8]}]"


def test_what_is_registered() -> None:
    assert tuple(TEMPLATES.names()) == BUILT_IN


def test_one_row_templates(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    for row, whole, learned in scenes(corpus, ranges, "name_it"):
        assert whole == f"{picture_of(row, ranges)} what is this? {text_of(row)}"
        assert learned == text_of(row)
    for row, whole, learned in scenes(corpus, ranges, "caption_first"):
        assert whole == learned == f"{text_of(row)}{picture_of(row, ranges)}"
    for row, whole, learned in scenes(corpus, ranges, "draw_it"):
        assert whole == f"draw: {text_of(row)}{picture_of(row, ranges)}"
        assert learned == picture_of(row, ranges)
    for row, whole, learned in scenes(corpus, ranges, "say_it"):
        assert whole.startswith(f"say: {text_of(row)}[s:")
        assert learned == whole.removeprefix(f"say: {text_of(row)}")
    for row, whole, learned in scenes(corpus, ranges, "transcribe"):
        assert re.fullmatch(r"\[s:\w+\] what was said\? " + re.escape(text_of(row)), whole)
        assert learned == text_of(row)


def test_a_picture_or_clip_alone(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    made = list(scenes(corpus, ranges, "alone", count=20))
    assert all(whole == learned for _, whole, learned in made)
    told = [whole for _, whole, _ in made]
    assert len(told) >= 20
    assert {whole[:3] for whole in told} == {"[i:", "[s:"}


def test_which_of_four_pictures(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    answers = set()
    for row, whole, learned in scenes(corpus, ranges, "which_picture", count=20):
        options = dict(re.findall(r" ([abcd]): (\[i:\w+\])", whole))
        assert len(set(options.values())) == 4
        assert whole.startswith(f"which is: {text_of(row)}?")
        assert options[learned] == picture_of(row, ranges)
        answers.add(learned)
    assert answers == set("abcd")
    assert teller(corpus, ranges, "which_picture", longest=256).piece(int(corpus.select("train")[0]), 0) is None


def test_which_of_four_words(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    for row, whole, learned in scenes(corpus, ranges, "which_words"):
        found = re.fullmatch(r"(\[i:\w+\]) what is this\? a: (.+) b: (.+) c: (.+) d: (.+) answer: ([abcd])", whole)
        assert found
        assert found[1] == picture_of(row, ranges)
        assert found[6] == learned
        assert found["_abcd".index(learned) + 1] == text_of(row)


def test_distractors_are_of_the_same_split_and_other_concepts(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    rows = corpus.select("test", having=("image",))
    made = Teller(DocumentBuilder(corpus, ranges), rows, {"tell": 1}, seed=0, longest=512)
    for number, index in enumerate(rows[:50].tolist()):
        scene = Scene(made, corpus[index], np.random.default_rng(number))
        others = scene.others(3, "image")
        assert others is not None
        assert {other.split for other in others} == {"test"}
        assert len({scene.row.group, *(other.group for other in others)}) == 4


def test_the_odd_one_is_of_another_topic(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    topic = {}
    for index in corpus.select("train", having=("image",)).tolist():
        topic[picture_of(corpus[index], ranges)] = int(corpus.rows["topic"][index])
    for _, whole, learned in scenes(corpus, ranges, "odd_one_out"):
        options = {letter: topic[image] for letter, image in re.findall(r" ([abcd]): (\[i:\w+\])", whole)}
        odd = options.pop(learned)
        assert len(set(options.values())) == 1
        assert odd not in options.values()
    words = scenes(corpus, ranges, "odd_one_out", longest=256)
    assert all("[i:" not in whole for _, whole, _ in words)


def test_without_topics_the_odd_one_is_another_thing(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    bare = replace(corpus, rows={key: column for key, column in corpus.rows.items() if key != "topic"})
    captions: dict[str, set[str]] = {}
    for index in corpus.select("train", having=("image",)).tolist():
        captions.setdefault(picture_of(corpus[index], ranges), set()).add(text_of(corpus[index]))
    for _, whole, learned in scenes(bare, ranges, "odd_one_out"):
        options = {letter: captions[image] for letter, image in re.findall(r" ([abcd]): (\[i:\w+\])", whole)}
        odd = options.pop(learned)
        assert set.intersection(*options.values())
        assert not odd & set.intersection(*options.values())


def test_what_comes_next(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    for _, whole, learned in scenes(corpus, ranges, "continue_it"):
        images = re.findall(r"\[i:\w+\]", whole)
        assert images[0] == images[2] != images[1] == images[3] == learned
    for _, whole, learned in scenes(corpus, ranges, "continue_it", longest=256):
        *shown, last = whole.removeprefix("continue: ").split(", ")
        assert last == learned
        assert last in (shown[-2], shown[-3] if len(shown) > 2 else None)


def test_counting(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    counts = Counter()
    for row, whole, learned in scenes(corpus, ranges, "count_them", count=30):
        images = re.findall(r"\[i:\w+\]", whole)
        assert set(images) == {picture_of(row, ranges)}
        assert learned == NUMBERS[len(images) - 1]
        counts[len(images)] += 1
    assert len(counts) >= 4


def test_translation_goes_both_ways(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    ways = set()
    for row, whole, learned in scenes(corpus, ranges, "translate"):
        found = re.fullmatch(r"(.+) in (\w+): (.+)", whole)
        assert found
        assert learned == found[3]
        assert text_of(row) in (found[1], found[3])
        ways.add(found[2] == "English")
        languages = {
            text_of(corpus[i]) for i in np.flatnonzero(corpus.rows["image"] == corpus.rows["image"][row.index]).tolist()
        }
        assert {found[1], found[3]} <= languages
    assert ways == {True, False}


def test_batches_of_a_mixture(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    mixture = dict.fromkeys(BUILT_IN, 1.0)
    batches = PackedSequences(corpus, ranges, sequence_length=512, batch_size=2, templates=mixture)
    for _ in range(6):
        batch = next(batches)
        learned = batch["labels"] >= 0
        assert batch["labels"][learned].equal(batch["input_ids"][learned])
        assert 0.1 < learned.float().mean() < 0.9
        for row in range(2):
            for number in range(int(batch["segment_ids"][row].max()) + 1):
                at = batch["segment_ids"][row] == number
                assert batch["labels"][row][at][0] == -100
                # running text may be cut to a single token, which nothing predicts
                assert (batch["labels"][row][at] >= 0).any() or at.sum() == 1


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(first[key].equal(second[key]) for key in first)


def test_a_mixture_repeats_and_resumes(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    def make(**changes: object) -> PackedSequences:
        mixture = {"which_words": 1.0, "name_it": 2.0, "tell": 1.0}
        options = {"sequence_length": 256, "batch_size": 2, "templates": mixture, **changes}
        return PackedSequences(corpus, ranges, **options)  # type: ignore[arg-type]

    running, again = make(), make()
    for _ in range(5):
        assert equal(next(running), next(again))
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for _ in range(5):
        assert equal(next(running), next(resumed))
    assert not equal(next(running), next(make(seed=1)))
    with pytest.raises(SequenceError, match="templates was .* and is {'tell': 1}"):
        make(templates={"tell": 1}).load_state_dict(running.state_dict())


def test_weights_are_kept(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    made = Teller(
        DocumentBuilder(corpus, ranges), corpus.select("train"), {"name_it": 3.0, "draw_it": 1.0}, seed=0, longest=256
    )
    rows = corpus.select("train", having=("image",))[:400].tolist()
    named = sum(told(piece, ranges)[1][:3] != "[i:" for row in rows if (piece := made.piece(row, 0)))
    assert named / len(rows) == pytest.approx(0.75, abs=0.07)


def test_a_template_of_ones_own(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    @register_template("repeat_it", needs=("speech",))
    def repeat_it(scene: Scene) -> list[Span]:
        return [scene.own("speech"), scene.words(" again: "), scene.own("speech", learned=True)]

    try:
        _, whole, learned = scenes(corpus, ranges, "repeat_it", count=4)[0]
        assert whole == f"{learned} again: {learned}"
        batches = PackedSequences(
            corpus, ranges, sequence_length=256, batch_size=2, templates={"repeat_it": 1}, text_share=0.0
        )
        assert set(next(batches)["modality_ids"].unique().tolist()) == {0, 2}
    finally:
        TEMPLATES.remove("repeat_it")


def test_refusals(corpus: Corpus, ranges: dict[str, TokenRange]) -> None:
    def make(**changes: object) -> PackedSequences:
        return PackedSequences(corpus, ranges, **{"sequence_length": 256, "batch_size": 2, **changes})  # type: ignore[arg-type]

    with pytest.raises(RegistryError, match="unknown template 'name_its'; did you mean 'name_it'"):
        make(templates={"name_its": 1})
    with pytest.raises(SequenceError, match="positive weights, got {'tell': 0}"):
        make(templates={"tell": 0})
    with pytest.raises(SequenceError, match="positive weights, got {}"):
        make(templates={})
    with pytest.raises(SequenceError, match="none of the templates which_picture can tell a row"):
        next(make(templates={"which_picture": 1}, text_share=0.0, split="drawing"))
    with pytest.raises(SequenceError, match="needs 'video'"):
        register_template("watch_it", needs=("video",))
    with pytest.raises(SequenceError, match="the text tokenizer has 272 ids, the corpus was made with"):
        make(templates={"tell": 1}, text_tokenizer=load_tokenizer("bytes"))


def test_the_default_is_bitwise_what_it_was_before_templates() -> None:
    """A small corpus of fixed numbers, and the digest of its batches taken before templates came."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, 9, 60)
    texts = Ragged(values=random.integers(16, 90, lengths.sum()), offsets=np.concatenate([[0], np.cumsum(lengths)]))
    spoken = random.integers(3, 12, 40)
    clips = Ragged(values=random.integers(0, 30, spoken.sum()), offsets=np.concatenate([[0], np.cumsum(spoken)]))
    rows = {
        "text": np.arange(50),
        "image": np.arange(50) % 20 - 1,
        "audio": np.arange(50) % 41 - 1,
        "split": np.zeros(50, int),
        "group": np.arange(50),
        "lang": np.zeros(50, int),
        "source": np.zeros(50, int),
        "style": np.zeros(50, int),
    }
    meta = {
        "vocab_sizes": {"text": 100, "image": 40, "speech": 30},
        "num_tokens": {"text": None, "image": 4, "speech": None},
        "grids": {"image": [2, 2]},
        "languages": ["en"],
        "sources": ["x"],
        "styles": ["x"],
        "rows_sha256": "0",
    }
    corpus = Corpus(
        name="fixed",
        texts=texts,
        images=random.integers(0, 40, (20, 4)),
        clips=clips,
        rows=rows,
        documents={"text": np.arange(50, 60), "split": np.zeros(10, int), "source": np.zeros(10, int)},
        meta=meta,
    )
    batches = PackedSequences(corpus, default_ranges(corpus), sequence_length=48, batch_size=3, seed=4)
    digest = hashlib.sha256()
    for _ in range(20):
        batch = next(batches)
        for key in sorted(batch):
            digest.update(batch[key].to(torch.int64).numpy().tobytes())
    assert digest.hexdigest() == "92036950885c6326de373936552ae9813192c10591c6b98019d83ab5ec863776"
