"""Word errors of transcripts worked out by hand, and the metric with the recogniser where it is installed."""

from __future__ import annotations

import pytest

from omnimoe.encoders import EncoderError, load_encoder
from omnimoe.evaluate import evaluate
from omnimoe.evaluate.speech import scored


def test_rates_by_hand():
    heard = ["Vacuum cleaner.", "bless", "", "a fire engine", "Twenty one!"]
    said = ["vacuum cleaner", "gloves", "owl", "fire engine", "twenty-one"]
    rate, right, ten = scored("m", heard, said)
    # 0 of 2, 1 of 1, 1 of 1, 1 of 2, 0 of 1 ("twenty-one" is one numeral)
    assert rate.value == pytest.approx(3 / 7)
    assert rate.count == 7
    assert rate.low < rate.value < rate.high
    assert right.value == pytest.approx(2 / 5)
    assert (ten.value, ten.count, ten.unit) == (2, 5, "clips")


def test_only_the_first_ten_count_among_ten():
    _, right, ten = scored("m", ["owl"] * 8 + ["cat"] * 8, ["owl"] * 16)
    assert right.value == 0.5
    assert (ten.value, ten.count) == (8, 10)


@pytest.fixture(scope="module")
def _recogniser():
    try:
        load_encoder("whisper_tiny")
    except EncoderError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.usefixtures("_recogniser")
def test_clips_from_tokens_are_heard_better_than_those_of_a_fresh_model(corpus, fresh, tmp_path):
    found = evaluate({"fresh": fresh}, corpus=corpus, metrics=["speech"], num=10, out=tmp_path)
    assert found.columns("speech") == ["fresh", "decoded"]
    decoded, spoken = (found.find("speech", "word error rate", of) for of in ("decoded", "fresh"))
    assert decoded.value < spoken.value
    assert decoded.value < 0.8
    assert found.find("speech", "heard right, of the first 10", "fresh").value == 0
    assert found.find("speech", "heard right, of the first 10", "decoded").value >= 2
    assert len(found.sounds["speech"]) == 5
    assert found.sounds["speech"][0][0].read_bytes().startswith(b"RIFF")
    assert any("original clips are not at hand" in note for note in found.notes["speech"])
