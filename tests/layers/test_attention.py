"""Attention as a part: its own contract, and parts of other people."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnimoe.config import Config
from omnimoe.layers import ATTENTIONS, Attention, BaseAttention, register_attention
from tests.declarations import DENSE, MOT, build, ids_like


def test_site_towers_override_the_map_of_the_whole():
    config = Attention.Config(
        num_heads=2, towers="modality", site_towers={"v_proj": "shared", "o_proj": (0, 1, 1)}, qk_norm="rms"
    )
    layer = config.build(hidden_size=8, num_modalities=3, layer_idx=0)
    counts = {name: len(value) for name, value in layer.state_dict().items()}
    assert counts == {
        "q_proj.weight": 3,
        "k_proj.weight": 3,
        "v_proj.weight": 1,
        "o_proj.weight": 2,
        "q_norm.weight": 3,
        "k_norm.weight": 3,
    }


def test_shapes_under_grouped_queries_and_a_free_head_width():
    config = Attention.Config(num_heads=6, num_kv_heads=2, head_dim=10, qk_norm="layer", bias=True, output_bias=True)
    layer = config.build(hidden_size=8, num_modalities=1, layer_idx=0)
    shapes = {name: tuple(value.shape[1:]) for name, value in layer.state_dict().items()}
    assert shapes["q_proj.weight"] == (60, 8)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (20, 8)
    assert shapes["o_proj.weight"] == (8, 60)
    assert shapes["q_norm.weight"] == (6, 10)
    assert shapes["k_norm.bias"] == (2, 10)
    assert shapes["o_proj.bias"] == (8,)


def test_without_rotary_positions_order_is_seen_only_through_the_mask():
    config = DENSE.replace(attention=DENSE.attention.replace(rope=None), mask="bidirectional", num_layers=1)
    model, ids = build(config), ids_like(config, 1, 6)
    turned = model(ids.flip(1)).logits.flip(1)
    torch.testing.assert_close(turned, model(ids).logits, atol=1e-5, rtol=1e-4)
    rotary = build(config.replace(attention=DENSE.attention))
    assert not torch.allclose(rotary(ids.flip(1)).logits.flip(1), rotary(ids).logits, atol=1e-3)


def test_positions_in_several_axes_reach_the_heads():
    from omnimoe.layers import Rope

    config = MOT.replace(attention=MOT.attention.replace(rope=Rope.Config(sections=(1, 1))))
    model, ids = build(config), ids_like(config, 2, 6)
    text = torch.arange(6).view(1, 6, 1).expand(2, 6, 2)
    torch.testing.assert_close(model(ids, position_ids=text).logits, model(ids).logits)
    grid = torch.stack((torch.arange(6) // 2, torch.arange(6) % 2), -1).expand(2, 6, 2)
    assert not torch.allclose(model(ids, position_ids=grid).logits, model(ids).logits, atol=1e-3)


def test_an_attention_of_ones_own_takes_the_place_of_ours():
    @register_attention("running_mean_test")
    class RunningMean(BaseAttention):
        @dataclass(frozen=True, kw_only=True)
        class Config(BaseAttention.Config):
            scale: float = 1.0

            @property
            def needs_key_order(self) -> bool:
                return False

        def __init__(self, config: Config, *, hidden_size, num_modalities, layer_idx):
            super().__init__()
            self.scale = config.scale

        def forward(self, x, rows, mask, cache):
            seen = rows.to_time(x)
            count = torch.arange(1, seen.shape[1] + 1).view(1, -1, 1)
            return rows.to_rows(self.scale * seen.cumsum(1) / count)

    try:
        config = DENSE.replace(attention=RunningMean.Config(scale=2.0))
        ids = ids_like(config)
        out = build(config)(ids, labels=ids)
        out.loss.backward()
        assert out.logits.isfinite().all()
        assert config.from_dict(config.to_dict()).attention == config.attention
    finally:
        ATTENTIONS.remove("running_mean_test")
