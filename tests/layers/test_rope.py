"""Rotary tables in one, two or three axes."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.layers import Rope
from omnimoe.ops import rope


def test_angles_fall_geometrically_from_the_position_itself():
    cos, sin = Rope(Rope.Config(theta=100.0), head_dim=8).table(torch.tensor([[3]]))
    for pair in range(4):
        angle = 3 * 100.0 ** (-pair / 4)
        assert cos[0, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert cos.dtype == torch.float32


def test_scores_depend_on_the_distance_alone():
    table = Rope(Rope.Config(), head_dim=8)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(q: int, k: int) -> torch.Tensor:
        turned = [rope(x, *table.table(torch.tensor([[at]]))) for x, at in ((query, q), (key, k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(score(9, 4), score(9, 5), atol=1e-3)


def test_each_section_turns_with_its_own_axis():
    table = Rope(Rope.Config(sections=(2, 1, 1)), head_dim=8)
    assert table.num_axes == 3
    cos, _ = table.table(torch.tensor([[5, 7, 11]]))
    single = Rope(Rope.Config(), head_dim=8)
    for pair, position in enumerate((5, 5, 7, 11)):
        assert cos[0, pair] == single.table(torch.tensor([[position]]))[0][0, pair]


def test_axes_take_the_turns_that_are_written_down():
    cos, _ = Rope(Rope.Config(axes=(1, 2, 1, 0)), head_dim=8).table(torch.tensor([[5, 7, 11]]))
    single = Rope(Rope.Config(), head_dim=8)
    for pair, position in enumerate((7, 11, 7, 5)):
        assert cos[0, pair] == single.table(torch.tensor([[position]]))[0][0, pair]


@pytest.mark.parametrize(
    "wrong", [{"axes": (0, 2, 0, 2)}, {"axes": (0, 1)}, {"axes": (0, 1, 0, 1), "sections": (2, 2)}]
)
def test_axes_that_name_no_turn_are_refused(wrong):
    with pytest.raises(ConfigError, match="of each of the 4 frequencies of head_dim 8"):
        Rope(Rope.Config(**wrong), head_dim=8)


def test_one_position_for_all_axes_is_ordinary_text():
    several, single = Rope(Rope.Config(sections=(2, 1, 1)), head_dim=8), Rope(Rope.Config(), head_dim=8)
    at = torch.arange(6).unsqueeze(1)
    assert torch.equal(several.table(at)[0], single.table(at)[0])
    assert torch.equal(several.table(at.expand(-1, 3))[1], single.table(at)[1])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="head_dim must be even, got 7"):
        Rope(Rope.Config(), head_dim=7)
    with pytest.raises(ConfigError, match="must sum to half of head_dim 8"):
        Rope(Rope.Config(sections=(1, 1)), head_dim=8)
    with pytest.raises(ValueError, match="positions have 2 axes, rope has 3"):
        Rope(Rope.Config(sections=(2, 1, 1)), head_dim=8).table(torch.zeros(1, 2))
