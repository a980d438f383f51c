"""Pictures through the encoder: real ones are close and recognised, noise is neither; without the encoder, a reason."""

from __future__ import annotations

import numpy as np
import pytest

from omnimoe.encoders import EncoderError, load_encoder
from omnimoe.encoders.wheels import WheelFile
from omnimoe.evaluate import evaluate
from omnimoe.evaluate.pictures import recognition_scores
from omnimoe.evaluate.retrieval import wins


@pytest.fixture(scope="module")
def encoder():
    try:
        return load_encoder("efficientnet_lite0")
    except EncoderError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def found(encoder, raw_folder, small, fresh, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return evaluate({"fresh": fresh}, corpus=small, metrics=["pictures"], raw=raw_folder, num=10, out=out)


def test_columns_are_the_model_and_what_it_is_held_against(found):
    assert found.columns("pictures") == ["fresh", "real", "decoded"]
    assert [name for name, _, _ in found.rows("pictures")][:2] == ["kernel distance", "Fréchet distance"]


def test_real_pictures_are_closer_to_real_ones_than_those_of_a_fresh_model(found):
    for name in ("kernel distance", "Fréchet distance"):
        real, drawn = (found.find("pictures", name, of) for of in ("real", "fresh"))
        assert real.value < drawn.value
        assert real.count == drawn.count == 10
    assert (
        found.find("pictures", "kernel distance", "fresh").low > found.find("pictures", "kernel distance", "real").value
    )


def test_real_drawings_are_recognised_in_another_style(found):
    measure = found.find("pictures", "recognised, 1 of 4", "real")
    assert measure.value > 0.6
    assert measure.chance == 0.25
    assert found.find("pictures", "recognised, 1 of 4", "fresh").value < measure.value


def test_a_contact_sheet_of_all_columns(found):
    ((file, _),) = found.sheets["pictures"]
    assert file.name == "pictures.png"
    assert file.stat().st_size > 5_000


@pytest.mark.usefixtures("encoder")
def test_without_raw_the_decoded_pictures_are_the_real_ones(small, fresh):
    found = evaluate({"fresh": fresh}, corpus=small, metrics=["pictures"], num=6)
    assert found.columns("pictures") == ["fresh", "real"]
    assert any("real pictures are what their tokens decode to" in note for note in found.notes["pictures"])


def test_recognition_of_known_features():
    prototypes = np.eye(4)
    queries = np.array([[3.0, 1, 0, 0], [0, 0.2, 5, 0]])
    picks = np.array([[0, 1, 2], [1, 2, 3]])
    assert wins(recognition_scores(queries, prototypes, picks)).tolist() == [1.0, 0.0]


def test_a_missing_encoder_is_reported_and_the_rest_runs(small, fresh, monkeypatch):
    missing = WheelFile(distribution="no-such", version="1", package="no_such_wheel", path="x", sha256="0")
    monkeypatch.setattr("omnimoe.encoders.efficientnet.WEIGHTS", missing)
    monkeypatch.setattr("omnimoe.encoders.whisper.WEIGHTS", missing)
    found = evaluate({"fresh": fresh}, corpus=small, metrics=["pictures", "speech", "loss"], num=4)
    assert set(found.not_run) == {"pictures", "speech"}
    assert all("pip install 'omnimoe[encoders]'" in reason for reason in found.not_run.values())
    assert list(found.measures) == ["loss"]
    assert found.to_dict()["not_run"] == found.not_run
