"""An oracle is always right, a scorer that knows nothing as often as chance, a model that learned above it."""

from __future__ import annotations

import numpy as np
import pytest

from omnimoe.evaluate import Bench, evaluate
from omnimoe.evaluate.retrieval import candidate_scores, wins


@pytest.fixture(scope="module")
def trials(corpus, fresh):
    bench = Bench(models={"fresh": fresh}, corpus=corpus)
    examples = bench.concepts("text", "image", num=60)
    picks = np.array([[i, *bench.wrong_ones(i, 60, 9)] for i in range(60)])
    return examples, picks


def pairs_of(examples):
    return {(example.text.tobytes(), example.image.tobytes()) for example in examples}


def test_an_oracle_is_always_right(trials):
    examples, picks = trials
    right = pairs_of(examples)

    def oracle(documents):
        scores = [bool(given) and (given[0][1].tobytes(), target[1].tobytes()) in right for given, target in documents]
        return np.array(scores, dtype=float), np.full(len(documents), 64)

    for values in candidate_scores(oracle, examples, picks, "text", "image").values():
        assert wins(values).tolist() == [1.0] * 60
        assert wins(values[:, :4]).tolist() == [1.0] * 60


def test_a_scorer_that_tells_nothing_apart_is_right_as_often_as_chance(trials):
    flat = lambda documents: (np.zeros(len(documents)), np.ones(len(documents)))  # noqa: E731
    for values in candidate_scores(flat, *trials, "text", "image").values():
        assert wins(values).mean() == pytest.approx(0.1)


def test_gain_takes_out_what_a_candidate_is_worth_by_itself(trials):
    """A scorer that likes some pictures whatever the caption, far more than the caption matters."""
    examples, picks = trials
    right = pairs_of(examples)

    def biased(documents):
        scores = []
        for given, (_, ids) in documents:
            liking = 100.0 * (ids.sum() % 97)
            scores.append(liking + (bool(given) and (given[0][1].tobytes(), ids.tobytes()) in right))
        return np.array(scores), np.full(len(documents), 64)

    found = candidate_scores(biased, examples, picks, "text", "image")
    assert wins(found["likelihood"]).mean() < 0.5
    assert wins(found["gain"]).mean() == 1.0


def test_a_fresh_model_is_at_chance(corpus, fresh):
    found = evaluate({"fresh": fresh}, corpus=corpus, metrics=["retrieval"], num=25, candidates=(4,))
    for name in ("text -> image", "image -> text", "speech -> text"):
        measure = found.find("retrieval", f"{name}, 1 of 4, gain", "fresh")
        assert measure.chance == 0.25
        assert measure.count == 25
        assert measure.low <= 0.25 <= measure.high


def test_a_model_that_knows_the_pairs_is_above_chance(few, learned):
    found = evaluate({"learned": learned}, corpus=few, split="train", metrics=["retrieval"], num=None)
    for name in ("text -> image", "image -> text"):
        for size in (4, 10):
            measure = found.find("retrieval", f"{name}, 1 of {size}, gain", "learned")
            assert measure.value > 0.7
            assert measure.low > 2 * measure.chance
    # it never saw a clip
    assert found.find("retrieval", "speech -> image, 1 of 4, gain", "learned").value < 0.8


def test_forms_and_what_the_terminal_leaves_out(few, fresh):
    found = evaluate({"fresh": fresh}, corpus=few, split="train", metrics=["retrieval"], num=3, candidates=(2, 4))
    names = {measure.name for measure in found.measures["retrieval"]}
    assert "image -> text, 1 of 4, per token" in names
    assert "text -> image, 1 of 4, per token" not in names, "all pictures are equally long"
    shown = [name for name, _, _ in found.rows("retrieval", detail=False)]
    assert len(shown) == 12
    assert all("1 of 2" in name for name in shown)


def test_too_few_concepts_for_the_candidates(few, fresh):
    options = {"corpus": few, "split": "train", "metrics": ["retrieval"], "num": 3}
    found = evaluate({"fresh": fresh}, candidates=(2, 17), **options)
    assert any(
        "12 concepts with text and image, too few to choose among 17" in held for held in found.notes["retrieval"]
    )
    assert all("1 of 2" in measure.name for measure in found.measures["retrieval"])
    found = evaluate({"fresh": fresh}, candidates=(17,), **options)
    assert "too few to choose among 17" in found.not_run["retrieval"]
    assert found.measures == {}


def test_directions_that_the_split_lacks_are_told(corpus, fresh):
    rows = corpus.select("test", having=("text", "image"))
    silent = Bench(models={}, corpus=corpus).subset(rows[:40])
    silent.rows["audio"][:] = -1
    found = evaluate({"fresh": fresh}, corpus=silent, metrics=["retrieval"], num=3, candidates=(2,))
    assert {measure.name.partition(",")[0] for measure in found.measures["retrieval"]} == {
        "text -> image",
        "image -> text",
    }
    assert any("has no row with text and speech" in note for note in found.notes["retrieval"])
