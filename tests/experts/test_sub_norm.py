"""A feed-forward bank with a norm between its products, against a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe import ConfigError
from omnimoe.experts import SubNormFeedForward
from omnimoe.layers import RowLayout


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("towers", [(0, 1, 0), "shared"], ids=str)
def test_each_row_meets_the_copy_of_its_key(gated, bias, towers):
    config = SubNormFeedForward.Config(intermediate_size=5, gated=gated, bias=bias, towers=towers, inner_norm_eps=1e-4)
    layer = config.build(hidden_size=4, num_modalities=3, layer_idx=0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    rows, x = RowLayout.build(torch.tensor([[2, 0, 1, 1, 0]]), num_keys=3), torch.randn(5, 4)
    y, routing = layer(x, rows)
    assert routing is None
    up, down = layer.gate_up_proj, layer.down_proj
    for row, key in enumerate(rows.key_ids.tolist()):
        copy = layer.towers[key]
        inner = F.linear(x[row], up.weight[copy], up.bias[copy] if bias else None)
        inner = F.gelu(inner[:5]) * inner[5:] if gated else F.gelu(inner)
        inner = F.layer_norm(inner, (5,), down.norm.weight[copy], down.norm.bias[copy], 1e-4)
        torch.testing.assert_close(y[row], F.linear(inner, down.weight[copy], down.bias[copy] if bias else None))
    assert config.active_params(4, 0) == (3 if gated else 2) * 20
    assert config.needs_key_order == (towers != "shared")


@pytest.mark.parametrize(("change", "told"), [({"activation": "tanh"}, "tanh"), ({"intermediate_size": 0}, "got 0")])
def test_what_no_network_can_have_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        SubNormFeedForward.Config(**change)
