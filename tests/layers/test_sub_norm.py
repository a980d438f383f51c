"""A norm inside of a branch: every row by the copy of its key, against a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.layers import AttentionMask, NormedLinear, RowLayout, SubNormAttention

TOWERS = [(0, 1), (1, 0), (0, 0)]
ROWS = RowLayout.build(torch.tensor([[1, 0, 1, 1, 0]]), num_keys=2)


def shaken(layer):
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


@pytest.mark.parametrize("towers", TOWERS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_normed_linear(towers, bias):
    layer, x = shaken(NormedLinear(towers, 6, 4, bias, 1e-4)), torch.randn(5, 6)
    y = layer(x, ROWS)
    for row, key in enumerate(ROWS.key_ids.tolist()):
        copy = towers[key]
        normal = F.layer_norm(x[row], (6,), layer.norm.weight[copy], layer.norm.bias[copy], 1e-4)
        wanted = F.linear(normal, layer.weight[copy], layer.bias[copy] if bias else None)
        torch.testing.assert_close(y[row], wanted)


@pytest.mark.parametrize("towers", ["modality", "shared"])
def test_attention_is_normed_over_all_heads_before_it_leaves(towers):
    config = SubNormAttention.Config(num_heads=2, bias=True, output_bias=True, rope=None, towers=towers)
    layer = shaken(config.build(hidden_size=8, num_modalities=2, layer_idx=0))
    x = torch.randn(5, 8)
    mask = AttentionMask(
        rule="bidirectional", query_length=5, key_length=5, past_length=0, key_ids=torch.zeros(1, 5), device=x.device
    )
    found = ROWS.to_time(layer(x, ROWS, mask)[0])[0]
    keys = [1, 0, 1, 1, 0] if towers == "modality" else [0] * 5

    def through(site, rows):
        return torch.stack([F.linear(row, site.weight[k], site.bias[k]) for row, k in zip(rows, keys, strict=True)])

    seen = ROWS.to_time(x)[0]
    query, key, value = (through(site, seen).view(5, 2, 4) for site in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = [torch.softmax(query[:, h] @ key[:, h].T / 2, -1) @ value[:, h] for h in range(2)]
    mixed, norm = torch.cat(heads, dim=-1), layer.o_proj.norm
    normal = torch.stack(
        [F.layer_norm(row, (8,), norm.weight[k], norm.bias[k], 1e-5) for row, k in zip(mixed, keys, strict=True)]
    )
    torch.testing.assert_close(found, through(layer.o_proj, normal))
    assert config.tp_plan == {}
