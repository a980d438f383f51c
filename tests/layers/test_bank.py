"""Tower maps, and the start of a bank's parameters."""

from __future__ import annotations

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.layers import BankLinear, RowLayout, num_copies, resolve_towers
from omnimoe.layers.bank import select


@pytest.mark.parametrize(
    ("towers", "copies"),
    [
        ("shared", (0, 0, 0)),
        ("modality", (0, 1, 2)),
        ((0, 1, 1), (0, 1, 1)),
        ((1, 0, 1), (1, 0, 1)),
        ([0, 0, 0], (0, 0, 0)),
    ],
    ids=str,
)
def test_a_map_gives_the_copy_of_each_key(towers, copies):
    assert resolve_towers(towers, 3) == copies
    assert num_copies(copies) == len(set(copies))


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ("own", "unknown tower map 'own'; write 'shared', 'modality'"),
        ((0, 1), "has 2 entries for 3 keys; give one a key"),
        ((0, 2, 2), "must use every copy from 0 to 2"),
        ((0, -1, 0), "must use every copy"),
        ((), "has 0 entries for 3 keys"),
    ],
    ids=str,
)
def test_a_map_that_makes_no_sense_is_refused(towers, message):
    with pytest.raises(ConfigError) as caught:
        resolve_towers(towers, 3)
    assert message in str(caught.value)


def test_a_full_map_takes_the_bank_as_it_is_and_a_split_one_repeats_copies():
    rows = RowLayout.build(torch.tensor([[0, 1, 2, 2]]), num_keys=3)
    bank = torch.randn(3, 2)
    assert select(bank, (0, 1, 2), rows)[0] is bank
    weight, ends = select(bank[:2], (0, 1, 0), rows)
    assert torch.equal(weight, bank[[0, 1, 0]])
    assert ends.tolist() == [1, 2, 4]


def test_parameters_are_initialised_from_poisoned_memory():
    layer = BankLinear((0, 1), 64, 64, bias=True)
    assert 0.015 < layer.weight.std() < 0.025
    assert not layer.bias.any()
    layer.reset_parameters(std=1.0)
    assert 0.9 < layer.weight.std() < 1.1
