"""The stack of blocks, without the model around it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from omnimoe.backbone import Backbone, Block, LayerRange
from omnimoe.config import ConfigError
from omnimoe.experts import FeedForward, RoutedExperts
from omnimoe.layers import Attention, AttentionMask, BaseAttention, Norm, Rope, RowLayout
from omnimoe.routers import ExpertChoiceRouter

BLOCK = Block.Config(
    attention=Attention.Config(num_heads=2, towers="modality"),
    experts=FeedForward.Config(intermediate_size=12, towers="modality"),
    norm=Norm.Config(towers="modality"),
)
KEYS = torch.tensor([[0, 1, 1, 0, 1]])


def parts(block: Block.Config = BLOCK):
    rows = RowLayout.build(KEYS, num_keys=2)
    mask = AttentionMask(
        rule="causal", query_length=5, key_length=5, past_length=0, device=torch.device("cpu"), key_ids=KEYS
    )
    backbone = Backbone([block] * 2, hidden_size=8, num_modalities=2)
    for parameter in backbone.parameters():
        parameter.data.normal_(std=0.3)
    return backbone, rows, mask, rows.to_rows(torch.arange(5).view(1, 5, 1))


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_block_is_two_branches_with_a_norm_before_or_after(placement):
    backbone, rows, mask, positions = parts(BLOCK.replace(norm_placement=placement))
    x, layer = torch.randn(5, 8), backbone.layers[0]
    placed = rows.with_rotary(*Rope(Rope.Config(), head_dim=4).table(positions))
    if placement == "pre":
        middle = x + layer.self_attn(layer.attention_norm(x, rows), placed, mask)[0]
        wanted = middle + layer.mlp(layer.mlp_norm(middle, rows), rows)[0]
    else:
        middle = x + layer.attention_norm(layer.self_attn(x, placed, mask)[0], rows)
        wanted = middle + layer.mlp_norm(layer.mlp(middle, rows)[0], rows)
    found, routings, weights = layer(x, placed, mask)
    assert torch.equal(found, wanted)
    assert routings == (None,)
    assert weights is None


def test_layers_run_in_turn_and_are_seen_before_they_run():
    backbone, rows, mask, positions = parts()
    x, seen = torch.randn(5, 8), []
    y, routings, attentions = backbone(x, rows, mask, positions, observe=lambda x: seen.append(x) or x)
    placed = rows.with_rotary(*Rope(Rope.Config(), head_dim=4).table(positions))
    first = backbone.layers[0](x, placed, mask)[0]
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], first)
    assert torch.equal(y, backbone.layers[1](first, placed, mask)[0])
    assert routings == attentions == [None, None]


def test_a_backbone_without_layers_is_the_identity():
    _, rows, mask, positions = parts()
    x = torch.randn(5, 8)
    assert Backbone([], hidden_size=8, num_modalities=2)(x, rows, mask, positions)[0] is x


def test_a_range_changes_what_it_names_and_keeps_the_rest():
    changed = LayerRange(start=1, norm_placement="post", norm=Norm.Config(eps=0.1)).change(BLOCK)
    assert changed == BLOCK.replace(norm_placement="post", norm=Norm.Config(eps=0.1))
    assert LayerRange().change(BLOCK) == BLOCK


def test_key_order_is_asked_for_by_any_part():
    plain = Block.Config(attention=Attention.Config(num_heads=2))
    assert not plain.needs_key_order
    assert plain.replace(norm=Norm.Config(towers="modality")).needs_key_order
    assert plain.replace(experts=FeedForward.Config(towers=(0, 1))).needs_key_order
    assert plain.replace(attention=Attention.Config(num_heads=2, towers="modality")).needs_key_order


def test_an_unknown_placement_is_refused():
    with pytest.raises(ConfigError, match="unknown norm_placement 'sandwich'; known: pre, post"):
        BLOCK.replace(norm_placement="sandwich")


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_row_that_no_expert_takes_passes_by_the_residual_alone(placement):
    sparse = RoutedExperts.Config(
        num_experts=4, intermediate_size=12, router=ExpertChoiceRouter.Config(capacity_factor=0.5)
    )
    backbone, rows, mask, positions = parts(BLOCK.replace(experts=sparse, norm_placement=placement))
    x, layer = torch.randn(5, 8), backbone.layers[0]
    placed = rows.with_rotary(*Rope(Rope.Config(), head_dim=4).table(positions))
    if placement == "pre":
        middle = x + layer.self_attn(layer.attention_norm(x, rows), placed, mask)[0]
    else:
        middle = x + layer.attention_norm(layer.self_attn(x, placed, mask)[0], rows)
    y, (routing,), _ = layer(x, placed, mask)
    untaken = sorted(set(range(5)) - set(routing.token_index.tolist()))
    assert 0 < len(untaken) < 5
    assert torch.equal(y[untaken], middle[untaken])
    taken = routing.token_index.unique()
    assert (y[taken] != middle[taken]).any(-1).all()


class Turning(BaseAttention):
    """No attention: the rotary table of the rows in the place of it, for a head as wide as the model."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseAttention.Config):
        theta: float | None = None

    def __init__(self, config, *, hidden_size, num_modalities, layer_idx) -> None:
        super().__init__()
        self.theta, self.width = config.theta, hidden_size

    def rotary(self):
        return None if self.theta is None else (Rope.Config(theta=self.theta), self.width)

    def forward(self, x, rows, mask, cache=None):
        return torch.zeros_like(x) if rows.cos is None else torch.cat((rows.cos, rows.sin), dim=1)


def test_an_attention_of_ones_own_gets_the_rotary_table_it_asks_for_and_no_other():
    backbone, rows, mask, positions = parts(BLOCK.replace(attention=Turning.Config(theta=100.0)))
    seen = []
    backbone.layers[0].self_attn.register_forward_hook(lambda *call: seen.append(call[-1]))
    backbone(torch.randn(5, 8), rows, mask, positions)
    cos, sin = Rope(Rope.Config(theta=100.0), head_dim=8).table(positions)
    assert torch.equal(seen[0], torch.cat((cos, sin), dim=1))
    backbone, rows, mask, positions = parts(BLOCK.replace(attention=Turning.Config()))
    backbone.layers[1].self_attn.register_forward_hook(lambda *call: seen.append(call[-1]))
    backbone(torch.randn(5, 8), rows, mask, positions)
    assert not seen[1].any()
