"""The pair that is timed side by side gives the same logits, at once and with a cache."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.chameleon.peer import make_pair


@pytest.mark.parametrize("form", ["7b", pytest.param("34b", marks=pytest.mark.slow)])
@torch.no_grad()
def test_both_give_the_same(form):
    pair = make_pair(form, batch_size=2, length=64)
    start = pair.ids.shape[1] - 1
    wanted = pair.theirs.lm_head(pair.theirs.model(pair.ids).last_hidden_state)
    found = pair.ours(pair.ids[:, :start], use_cache=True)
    step = pair.ours(pair.ids[:, start:], past_key_values=found.past_key_values)
    logits = torch.cat((found.logits, step.logits), dim=1)
    assert float((logits - wanted).norm() / wanted.norm()) < 1e-5
    assert pair.ours.config.num_layers == 8
