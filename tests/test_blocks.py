"""Blocks and the positions they share, against a plain walk over each row."""

from __future__ import annotations

import random

import pytest
import torch

from omnimoe.blocks import block_ids_of, block_positions
from omnimoe.config import ConfigError
from omnimoe.modalities import GridPatches, Tokens
from omnimoe.model import OmniMoeConfig

TEXT, SEEN, DRAWN = 0, 1, 2
CONFIG = OmniMoeConfig(
    hidden_size=16,
    num_layers=1,
    modalities=(
        Tokens.Config(name="text", vocab_size=10),
        GridPatches.Config(name="seen", channels=4, begin_id=7, end_id=8, placeholder_id=5),
        GridPatches.Config(name="drawn", channels=4, begin_id=7, end_id=8, placeholder_id=6),
    ),
    mask="block_causal",
    bidirectional_modalities=("seen", "drawn"),
    block_markers=True,
    private_noise=True,
    positions="blocks",
)


def drawn_row(generator: random.Random) -> list[tuple[int, int, bool]]:
    """(token, modality, noisy) of a document of texts and pictures."""
    row: list[tuple[int, int, bool]] = []
    for _ in range(generator.randint(1, 5)):
        if generator.random() < 0.5:
            row += [(generator.randint(1, 4), TEXT, False) for _ in range(generator.randint(1, 3))]
        else:
            kind = generator.choice((SEEN, DRAWN))
            noisy = kind == DRAWN and generator.random() < 0.5
            row += [(7, TEXT, False), *[(4 + kind, kind, noisy)] * generator.randint(1, 4), (8, TEXT, False)]
    return row


def walked(row: list[tuple[int, int, bool]]) -> tuple[list[int], list[int]]:
    """Which block each token is in (0 for none, negative for private), and its position."""
    blocks, places, place, at, number = [], [], 0, 0, 0
    while at < len(row):
        token = row[at][0]
        if token != 7:
            blocks.append(0)
            places.append(place)
            place, at = place + 1, at + 1
            continue
        stop = next(i for i in range(at, len(row)) if row[i][0] == 8) + 1
        number += 1
        is_noisy = any(noisy for _, _, noisy in row[at:stop])
        blocks += [-number if is_noisy else number] * (stop - at)
        places += [place] * (stop - at)
        place, at = place + (0 if is_noisy else 1), stop
    return blocks, places


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("side", ["left", "right"])
def test_against_a_walk(seed, side):
    generator = random.Random(seed)
    rows = [drawn_row(generator) for _ in range(3)]
    length = max(map(len, rows))
    empty = (0, TEXT, False)
    padded = [
        [empty] * (length - len(row)) + row if side == "left" else row + [empty] * (length - len(row)) for row in rows
    ]
    ids, kinds, noisy = (torch.tensor([[cell[i] for cell in row] for row in padded]) for i in range(3))
    valid = torch.tensor(
        [[(at >= length - len(row)) if side == "left" else at < len(row) for at in range(length)] for row in rows]
    )
    found = block_ids_of(CONFIG, kinds, ids, noisy.bool())
    places = block_positions(found, valid)
    for row, mask, blocks, place in zip(rows, valid, found, places, strict=True):
        wanted_blocks, wanted_places = walked(row)
        held = blocks[mask].tolist()
        assert [(block > 0) - (block < -1) for block in held] == [(b > 0) - (b < 0) for b in wanted_blocks]
        same = [[a == b and a != -1 for b in held] for a in held]
        assert same == [[a == b and a != 0 for b in wanted_blocks] for a in wanted_blocks]
        assert place[mask].tolist() == wanted_places


def test_packed_documents_count_from_zero_each():
    ids = torch.tensor([[1, 7, 6, 8, 2, 1, 7, 6, 6, 8, 3]])
    kinds = torch.tensor([[0, 0, 2, 0, 0, 0, 0, 2, 2, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    blocks = block_ids_of(CONFIG, kinds, ids)
    assert block_positions(blocks, None, segments).tolist() == [[0, 1, 1, 1, 2, 0, 1, 1, 1, 1, 2]]


def test_without_markers_and_privacy_blocks_are_the_runs_of_a_modality():
    plain = CONFIG.replace(block_markers=False, private_noise=False, positions="time")
    kinds = torch.tensor([[1, 1, 0, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0, 1]])
    ids = torch.tensor([[5, 5, 7, 5, 6, 6, 8], [1, 1, 1, 1, 1, 7, 5]])
    assert (block_ids_of(plain.replace(bidirectional_modalities=("seen",)), kinds) >= 0).tolist() == (
        kinds == 1
    ).tolist()
    first, second = block_ids_of(plain, kinds, ids, kinds > 0).tolist()
    assert first[0] == first[1]
    assert len({first[0], first[3], first[4]}) == 3
    assert first[4] == first[5]
    assert first[2] == first[6] == second[0] == second[5] == -1
    assert min(first + second) == -1, "nothing is private"


def test_an_unknown_way_to_count_is_refused():
    with pytest.raises(ConfigError, match=r"positions must be .*'blocks'.*, got 'picture'"):
        CONFIG.replace(positions="picture")


def test_neighbouring_spans_may_be_one_block_and_every_block_private():
    ids = torch.tensor([[1, SEEN, SEEN, DRAWN, 1, DRAWN, SEEN]])
    kinds = torch.tensor([[TEXT, SEEN, SEEN, DRAWN, TEXT, DRAWN, SEEN]])
    apart = block_ids_of(CONFIG.replace(block_markers=False), kinds, ids)[0].tolist()
    assert apart == [-1, 2, 2, 3, -1, 5, 6]
    joined = CONFIG.replace(block_markers=False, joint_blocks=True)
    assert block_ids_of(joined, kinds, ids)[0].tolist() == [-1, 2, 2, 2, -1, 4, 4]
    private = joined.replace(private_blocks=True)
    assert block_ids_of(private, kinds, ids)[0].tolist() == [-1, -3, -3, -3, -1, -5, -5]
