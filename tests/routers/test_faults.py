"""Rows that a router could not route are counted by layer and modality, and nothing waits for the count."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from omnimoe.layers import RowLayout
from omnimoe.routers import Routing, router_faults

ROWS = RowLayout.build(torch.tensor([[0, 1, 1, 2]]), num_keys=3)


def routing(logits: list[list[float]] | None, weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Routing:
    index = torch.arange(len(weights)) % 4
    found = None if logits is None else torch.tensor(logits)
    return Routing(index, torch.zeros_like(index), torch.tensor(weights), found)


NAN, INF = float("nan"), float("inf")
FINE = [[0.0, 1.0]] * 4
CASES = {
    "nothing": (FINE, (1.0,) * 4, [0, 0, 0]),
    "nothing computed": (None, (1.0,) * 4, [0, 0, 0]),
    "experts out of reach": ([[0.0, -INF]] * 4, (1.0,) * 4, [0, 0, 0]),
    "a lone expert, not routed": ([[-INF, -INF]] * 4, (1.0,) * 4, [0, 0, 0]),
    "NaN": ([[0.0, 1.0], [NAN, NAN], [0.0, NAN], [0.0, 1.0]], (1.0,) * 4, [0, 2, 0]),
    "plus infinity": ([[INF, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, INF]], (1.0,) * 4, [1, 0, 1]),
    "a weight": (FINE, (1.0, 1.0, INF, 1.0), [0, 1, 0]),
    "one of two weights of a row": (None, (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, NAN), [0, 0, 1]),
    "a row counts once": ([[NAN, NAN]] * 4, (NAN,) * 8, [1, 2, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_counted_by_modality(case):
    logits, weights, wanted = CASES[case]
    assert router_faults((routing(logits, weights),), ROWS, 3).tolist() == [wanted]


def test_layers_without_routing_have_a_row_of_zeros():
    spoiled = routing([[NAN, 0.0]] * 4)
    assert router_faults((None, spoiled, None), ROWS, 3).tolist() == [[0, 0, 0], [1, 2, 1], [0, 0, 0]]
    assert router_faults((), ROWS, 3).shape == (0, 3)


@pytest.mark.hazard(16)
def test_counting_reads_nothing_back_to_the_host():
    # a tensor without data refuses to be read
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = Routing(*(mode.from_tensor(held) for held in (torch.arange(4), torch.zeros(4), torch.ones(4))))
        assert router_faults((given,), ROWS, 3).shape == (1, 3)
