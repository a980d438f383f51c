"""The pair that is timed gives one answer."""

from __future__ import annotations

import pytest
import torch

from omnimoe.grids import grid_positions
from tests.zoo.ernie4_5_vl.peer import make_pair
from tests.zoo.weights import close


@pytest.mark.slow
@torch.no_grad()
def test_prefill_and_a_step():
    pair = make_pair()
    given = {**pair.given, "attention_mask": None}
    mine, wanted = pair.ours(**given, use_cache=True), pair.theirs(**pair.other, use_cache=True)
    close(mine.logits, wanted.logits)
    positions = grid_positions(
        pair.ours.config,
        pair.ours.model.modality_ids_of(given["input_ids"]),
        pair.ours.model.shapes_of(given["features"]),
    )
    step, place = given["input_ids"][:, -1:], positions[:, -1:] + 1
    mine = pair.ours(step, position_ids=place, past_key_values=mine.past_key_values)
    wanted = pair.theirs(step, position_ids=place.movedim(-1, 0), past_key_values=wanted.past_key_values)
    close(mine.logits, wanted.logits)
