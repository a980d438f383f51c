"""The feed-forward bank: every activation, with and without a gate, against a loop over groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe.ops import ACTIVATIONS, experts_mlp

PLAIN = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp_min(0),
    "relu2": lambda x: x.clamp_min(0) ** 2,
}


def test_every_activation_is_known_here():
    assert set(PLAIN) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("gated", [True, False])
def test_values_are_those_of_a_loop_over_groups(activation, gated):
    x = torch.randn(7, 4, dtype=torch.float64)
    into = torch.randn(3, 10 if gated else 5, 4, dtype=torch.float64)
    down = torch.randn(3, 4, 5, dtype=torch.float64)
    y = experts_mlp(x, into, down, torch.tensor([2, 2, 6], dtype=torch.int32), activation)
    wanted = []
    for row, group in enumerate((0, 0, 2, 2, 2, 2)):
        hidden = into[group] @ x[row]
        act = PLAIN[activation]
        hidden = act(hidden[:5]) * hidden[5:] if gated else act(hidden)
        wanted.append(down[group] @ hidden)
    torch.testing.assert_close(y[:6], torch.stack(wanted))
    assert torch.equal(y[6:], torch.zeros(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(gated):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    into = torch.randn(3, 8 if gated else 4, 3, dtype=torch.float64, requires_grad=True)
    down = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *given: experts_mlp(*given, offsets), (x, into, down))


def test_one_group_equals_a_plain_swiglu_layer_bit_for_bit():
    x, into, down = torch.randn(6, 8), torch.randn(24, 8), torch.randn(8, 12)
    gate, up = F.linear(x, into).chunk(2, dim=-1)
    y = experts_mlp(x, into[None], down[None], torch.tensor([6], dtype=torch.int32))
    assert torch.equal(y, F.linear(F.silu(gate) * up, down))


def test_bad_widths_and_activations_are_refused():
    x, offsets = torch.randn(2, 4), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="gate_up_proj must be \\(G, 10, D\\)"):
        experts_mlp(x, torch.randn(1, 7, 4), torch.randn(1, 4, 5), offsets)
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: silu"):
        experts_mlp(x, torch.randn(1, 10, 4), torch.randn(1, 4, 5), offsets, "swish")
