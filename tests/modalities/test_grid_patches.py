"""Latent patches of whole pictures: places, times, and the forms they may come in."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.layers.sine_grid import SineGrid, sine_grid
from omnimoe.modalities import GridPatches, Tokens
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM

CONFIG = GridPatches.Config(name="picture", channels=4, max_side=5, time_width=8)


@pytest.fixture
def modality() -> GridPatches:
    torch.manual_seed(0)
    made = CONFIG.build(hidden_size=16)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return made


def test_the_table_cell_by_cell():
    table = sine_grid(3, 8)
    for row in range(3):
        for column in range(3):
            wanted = []
            for at in (column, row):
                wanted += [math.sin(at), math.sin(at / 100), math.cos(at), math.cos(at / 100)]
            assert table[row * 3 + column].tolist() == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="a width that 4 divides, got 6"):
        sine_grid(3, 6)


def test_rows_by_their_formula(modality):
    picture, times = torch.randn(2, 3, 4), torch.tensor([0.25])
    found = modality.embed([picture], times)
    rate = torch.tensor([10_000.0 ** (-i / 4) for i in range(4)])
    code = torch.cat(((0.25 * rate).cos(), (0.25 * rate).sin()))
    time = modality.time_out(torch.nn.functional.silu(modality.time_in(code)))
    table = sine_grid(5, 16)
    for row in range(2):
        for column in range(3):
            wanted = modality.in_proj @ picture[row, column] + modality.in_bias + table[row * 5 + column] + time
            torch.testing.assert_close(found[row * 3 + column], wanted)


def test_a_list_and_one_tensor_are_the_same(modality):
    pictures = torch.randn(2, 2, 2, 4)
    assert torch.equal(modality.embed(pictures), modality.embed(list(pictures)))
    assert torch.equal(modality.rows_of(list(pictures)), pictures.flatten(0, 2))


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.zeros(6, 4), r"got \(6, 4\)"),
        ([torch.zeros(2, 3, 5)], r"got \(2, 3, 5\)"),
        ([torch.zeros(6, 1, 4)], r"at most 5 of each, in a list or one tensor, got \(6, 1, 4\)"),
        (["picture"], "got str"),
    ],
)
def test_another_form_is_refused(modality, given, got):
    with pytest.raises(ValueError, match=got):
        modality.embed(given)


def test_times_are_one_a_picture(modality):
    with pytest.raises(ValueError, match=r"must be \(1,\), one for each picture, got \(6,\)"):
        modality.embed([torch.zeros(2, 3, 4)], torch.zeros(6))


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="time_width even, got 5 and 7"):
        CONFIG.replace(time_width=7)


def test_the_table_is_saved_and_never_trained(tmp_path):
    config = OmniMoeConfig(
        hidden_size=16,
        num_layers=1,
        modalities=(Tokens.Config(name="text", vocab_size=8), CONFIG.replace(placeholder_id=7)),
    )
    model = OmniMoeForCausalLM(config)
    place = model.model.modalities["picture"].place
    assert isinstance(place, SineGrid)
    assert torch.equal(place.weight, sine_grid(5, 16))
    assert not place.weight.requires_grad
    model.save_pretrained(tmp_path)
    again = OmniMoeForCausalLM.from_pretrained(tmp_path).model.modalities["picture"].place
    assert torch.equal(again.weight, place.weight)
    ids = torch.tensor([[1, 7, 7, 2]])
    model(ids, features={"picture": [torch.randn(1, 2, 4)]}, labels=ids).loss.backward()
    assert place.weight.grad is None
