"""A checkpoint whose bytes were changed is read as what it says then, or refused; no other error, and no crash."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from omnimoe import CheckpointError
from omnimoe.checkpoint import check_folder
from tests.checkpoint.files import INDEX, WEIGHTS, load, same_weights
from tests.hazard_rows import EXAMPLES

BLOCKS = 10
EACH = EXAMPLES[2] // BLOCKS


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One of what happens to files: a bit, a byte, a run, a cut, an insertion, a piece twice; mostly in the header."""
    end = len(content) if chance.random() < 0.2 else 8 + int.from_bytes(content[:8], "little")
    place = chance.randrange(8 if chance.random() < 0.2 else end)
    kind = chance.randrange(6)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    if kind == 1:
        return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
    length = chance.randrange(1, 40)
    if kind == 2:
        return content[:place] + chance.randbytes(length) + content[place + length :]
    if kind == 3:
        return content[:place] + content[place + length :]
    if kind == 4:
        return content[:place] + chance.randbytes(length) + content[place:]
    return content[: place + length] + content[place:]


@pytest.mark.hazard(2)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_changed_bytes(saved, block):
    content = (saved / WEIGHTS).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    before = {
        name: tensor.clone() for name, tensor in load_file(saved / WEIGHTS).items()
    }  # of its own, not of the file
    outcomes = []
    for seed in range(block * EACH, (block + 1) * EACH):
        changed = mutated(content, random.Random(seed))
        (saved / WEIGHTS).write_bytes(changed)
        try:
            entries = check_folder(saved)
        except CheckpointError:
            outcomes.append("refused")
            continue
        # what passes can be read, as what it declares; where the header is the same, so is every byte that is
        with safe_open(saved / WEIGHTS, "pt") as file:
            read = {name: file.get_tensor(name) for name in entries}
        assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
            name: entry.shape for name, entry in entries.items()
        }
        is_same = changed[:length] == content[:length]
        if is_same:
            raw = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in read.items()}
            lost = sum(int((raw[name] != before[name].reshape(-1).view(torch.uint8)).sum()) for name in before)
            assert lost == sum(one != other for one, other in zip(changed, content, strict=True))
        outcomes.append("same header" if is_same else "other header")
    assert len(outcomes) == EACH
    assert outcomes.count("refused") > EACH // 2


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_header_that_can_be_read_is_no_other_model(saved, model, seed):
    """On to the model: a name, a shape or a dtype that changed is found, whatever the bytes still say."""
    content = (saved / WEIGHTS).read_bytes()
    chance = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    while True:
        place = chance.randrange(8, 8 + length)
        changed = content[:place] + bytes([chance.choice(b"abcfgiopux12468")]) + content[place + 1 :]
        if changed == content:
            continue
        (saved / WEIGHTS).write_bytes(changed)
        try:
            check_folder(saved)
        except CheckpointError:
            continue
        break
    try:
        loaded = load(saved)
    except CheckpointError:
        return
    # what is left are the notes of the header, which no model reads
    assert same_weights(loaded, model)


@pytest.mark.parametrize("block", range(2))
def test_changed_bytes_of_an_index(sharded, model, block):
    content = (sharded / INDEX).read_bytes()
    refusals = 0
    for seed in range(block * 50, (block + 1) * 50):
        chance = random.Random(seed)
        place = chance.randrange(len(content))
        (sharded / INDEX).write_bytes(content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :])
        try:
            check_folder(sharded)
        except CheckpointError:
            refusals += 1
    assert refusals > 25
