"""Weights that are NaN or infinite are legal in a file; they are told, refused or passed over as asked."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import from_pretrained
from tests.checkpoint.files import edit, load
from tests.refusals import refused, unchanged

NORM = "model.norm.weight"


def spoil(folder, value=float("nan"), dtype=torch.float32) -> None:
    def change(weights):
        for name in weights:
            weights[name] = weights[name].to(dtype)
        weights[NORM][0, 3] = value

    edit(folder, change)


@pytest.mark.hazard(11)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_error_where_it_is_asked_for(saved, value, dtype):
    spoil(saved, value, dtype)
    with refused(
        saved, f"1 weights of {saved} hold NaN or infinity, which spreads to every answer:\n  {NORM}: 1 of 16"
    ):
        load(saved, check_finite="error", dtype=dtype)


@pytest.mark.hazard(11)
@pytest.mark.parametrize("by", [load, from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_a_warning_where_nothing_is_said(saved, by, caplog):
    spoil(saved)
    with caplog.at_level(logging.WARNING, logger="omnimoe.checkpoint.finite"), unchanged(saved):
        model = by(saved)
    assert f"{NORM}: 1 of 16" in caplog.text
    assert not model.model.norm.weight.isfinite().all()


@pytest.mark.hazard(11)
def test_nothing_where_it_is_off(saved, caplog):
    spoil(saved)
    with caplog.at_level(logging.WARNING), unchanged(saved):
        load(saved, check_finite="off")
    assert "NaN" not in caplog.text


@pytest.mark.hazard(11)
def test_another_word_is_refused_before_anything_is_read(saved):
    with refused(saved, "check_finite must be one of 'warn', 'error', 'off', got True", ValueError):
        load(saved, check_finite=True)


def test_a_cast_that_overflows_is_seen(saved):
    """Finite in the file, infinite in half precision."""
    spoil(saved, 1e30)
    load(saved, check_finite="error")
    with refused(saved, f"{NORM}: 1 of 16"):
        load(saved, check_finite="error", dtype=torch.float16)
