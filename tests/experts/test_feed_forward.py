"""The feed-forward bank by key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.experts import FeedForward
from omnimoe.layers import RowLayout

ROWS = RowLayout.build(torch.tensor([[2, 0, 1, 0, 2]]), num_keys=3)


@pytest.mark.parametrize("towers", ["shared", "modality", (0, 1, 0), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_each_row_meets_the_copy_of_its_key(towers, gated):
    config = FeedForward.Config(intermediate_size=6, towers=towers, gated=gated, activation="gelu")
    layer, x = config.build(hidden_size=4, num_modalities=3, layer_idx=0), torch.randn(5, 4)
    y, routing = layer(x, ROWS)
    assert routing is None
    for row, key in enumerate(ROWS.key_ids.tolist()):
        copy = layer.towers[key]
        hidden = layer.experts.gate_up_proj[copy] @ x[row]
        hidden = F.gelu(hidden[:6]) * hidden[6:] if gated else F.gelu(hidden)
        torch.testing.assert_close(y[row], layer.experts.down_proj[copy] @ hidden)
    assert config.active_params(4, 0) == (3 if gated else 2) * 4 * 6
