"""Every architecture of the plan is there at every size, and costs what the dense model does."""

from __future__ import annotations

import pytest

from omnimoe.compare import ARCHITECTURES, baselines_of, resolve_names
from omnimoe.flops import flops
from omnimoe.model import MODELS

SIZES = ("pico", "nano", "micro", "small")


def cost(name: str) -> float:
    return flops(MODELS.get(name)(), sequence_length=256).per_token


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name, base in ARCHITECTURES.items() if base is not None])
def test_an_architecture_costs_what_its_baseline_does(name, size):
    ratio = cost(f"{name}_{size}") / cost(f"{ARCHITECTURES[name]}_{size}")
    if name == "mamba":
        assert 0.87 < ratio < 0.94, "as many weights as the dense model, and no scores of attention"
    else:
        assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_all_share_a_vocabulary(size):
    configs = [MODELS.get(name)() for name in resolve_names(["all"], size)]
    assert len(configs) == len(ARCHITECTURES)
    assert all(config.token_ranges == configs[0].token_ranges for config in configs)


@pytest.mark.parametrize("size", SIZES)
def test_what_looks_ahead_has_a_causal_form_but_for_the_mixture_of_depths(size):
    ahead = {name: MODELS.get(f"{name}_{size}")() for name in ARCHITECTURES}
    ahead = {name: config for name, config in ahead.items() if not config.is_causal}
    assert set(ahead) == {"mot_moe", "moma_2t2i2s", "moma_4t4i4s", "moe4x", "moe12x", "momad_4t4i4s"}
    without = {name for name, config in ahead.items() if not all(block.has_causal_form for block in config.blocks)}
    assert without == {"momad_4t4i4s"}


def test_short_names_are_completed_with_a_size():
    assert resolve_names(["dense", "mot"], "nano") == ["dense_nano", "mot_nano"]
    assert resolve_names(["mot", "mot_nano"], "micro") == ["mot_micro", "mot_nano"]
    assert resolve_names(["nothing"], "nano") == ["nothing"]
    assert resolve_names(["all"], "pico")[:2] == ["dense_pico", "mot_pico"]


def test_a_model_is_measured_in_the_steps_of_its_own_dense_form():
    assert baselines_of(["dense_nano", "mot_nano", "moma_nano"]) == {}
    assert baselines_of(["mamba_nano", "mixture_of_mamba_nano"]) == {}
    assert baselines_of(["dense_nano", "mixture_of_mamba_nano"]) == {}
    assert baselines_of(["dense_nano", "mot_text_alone_nano", "dense_micro", "mot_text_alone_micro"]) == {
        "mot_text_alone_micro": "dense_micro"
    }
