"""Settings refuse what no run can be made of, and go through JSON unchanged."""

from __future__ import annotations

import json
import math

import pytest

from omnimoe.config import ConfigError
from omnimoe.train import TrainSettings

WRONG = {
    "steps": 0,
    "batch_size": 0,
    "sequence_length": -1,
    "accumulate": 0,
    "log_every": 0,
    "warmup": -1,
    "clip": -0.1,
    "weight_decay": -0.1,
    "evaluate_every": -1,
    "save_every": -1,
    "evaluate_batches": -1,
    "seed": -1,
    "beta1": 1.0,
    "beta2": -0.1,
    "final_learning_rate": 1.5,
    "text_share": -0.1,
    "learning_rate": 0.0,
    "epsilon": 0.0,
    "precision": "fp8",
}


@pytest.mark.parametrize("field", WRONG)
def test_a_value_out_of_range_is_named(field):
    with pytest.raises(ConfigError, match=field) as error:
        TrainSettings(**{field: WRONG[field]})
    assert str(WRONG[field]) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 2.5), ("steps", "3"), ("steps", True), ("data", None), ("seed", 1.5), ("checkpoint_activations", "no")],
)
def test_a_value_of_another_type_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        TrainSettings(**{field: value})


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "clip", "beta1", "epsilon", "text_share"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_must_be_finite(field, value):
    with pytest.raises(ConfigError, match=field):
        TrainSettings(**{field: value})


@pytest.mark.parametrize("told", ["tell", "tell=", "tell=x", "tell=0", "tell=1,alone=-1", "tell=nan"])
def test_a_mixture_of_templates_is_read_early(told):
    with pytest.raises(ConfigError, match="templates"):
        TrainSettings(templates=told)
    assert TrainSettings(templates=" tell=3, alone=0.5 ").mixture == {"tell": 3.0, "alone": 0.5}
    assert TrainSettings().mixture is None


def test_zero_turns_parts_off():
    off = TrainSettings(warmup=0, clip=0, weight_decay=0, evaluate_every=0, evaluate_batches=0, save_every=0, beta1=0)
    assert off.clip == 0


def test_an_unknown_field_is_an_error_with_a_hint():
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        TrainSettings.from_dict({"batchsize": 2})


def test_settings_go_through_json():
    settings = TrainSettings(steps=7, learning_rate=1e-3, precision="fp32")
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_tokens_per_step_counts_every_forward():
    assert TrainSettings(batch_size=2, sequence_length=64, accumulate=3).tokens_per_step == 384


@pytest.mark.parametrize("told", ["speech", "speech=x", "speech=0", "speech=1", "speech=-0.1"])
def test_noise_is_read_early(told):
    with pytest.raises(ConfigError, match="noise"):
        TrainSettings(noise=told)
    assert TrainSettings(noise=" image=0.1,speech=0.25").noise_shares == {"image": 0.1, "speech": 0.25}
