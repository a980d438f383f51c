"""Features that enter several layers, against a plain walk through the layers."""

from __future__ import annotations

import pytest
import torch

from omnimoe import Attention, ConfigError, FeedForward, OmniMoeConfig, OmniMoeForCausalLM, Tokens
from omnimoe.encoders import Features
from omnimoe.encoders.merged import Qwen3VL
from omnimoe.modalities import Deep

TOWER = Qwen3VL.Config(
    hidden_size=32, intermediate_size=40, num_layers=2, num_heads=2, num_places=16, patch_size=4, out_size=16,
    deep_layers=(0, 1),
)  # fmt: skip
SEEN = Deep.Config(name="seen", channels=48, depth=2, encoder=TOWER, placeholder_id=9)


def make_model(num_layers: int) -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    text = Tokens.Config(name="text", vocab_size=10)
    return OmniMoeForCausalLM(
        OmniMoeConfig(
            hidden_size=16,
            num_layers=num_layers,
            modalities=(text, SEEN),
            attention=Attention.Config(num_heads=2, towers=(0, 1)),
            experts=FeedForward.Config(intermediate_size=16, towers=(0, 1)),
            initializer_range=0.2,
        )
    ).eval()


IDS = torch.tensor([[0, 1, 9, 9, 2], [9, 9, 3, 4, 5]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("num_layers", [1, 2, 4])
@torch.no_grad()
def test_more_is_added_after_one_layer_and_after_two(num_layers):
    model = make_model(num_layers)
    rows = torch.randn(2, 2, 48)
    features = {"seen": Features(rows=rows, pooled=rows.mean(1))}
    out = model(IDS, attention_mask=MASK, features=features, output_hidden_states=True)
    plain = model(
        IDS, attention_mask=MASK, features={"seen": Features(rows=rows * (torch.arange(48) < 16), pooled=rows.mean(1))}
    )
    assert not torch.allclose(out.logits, plain.logits)
    entered = out.hidden_states[0]
    assert torch.equal(entered[0, 2:4], rows[0, :, :16])
    if num_layers > 1:
        # before the second layer: what the first made of the rows that entered, and more
        first = model(
            IDS, attention_mask=MASK, output_hidden_states=True,
            features={"seen": Features(rows=rows * (torch.arange(48) < 16), pooled=rows.mean(1))},
        ).hidden_states[1]  # fmt: skip
        added = out.hidden_states[1] - first
        torch.testing.assert_close(added[0, 2:4], rows[0, :, 16:32], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(added[1, :2], rows[1, :, 16:32], atol=1e-5, rtol=1e-4)
        assert float(added[:, 4].abs().max()) == 0


def test_the_encoder_is_a_part_of_the_model_and_absent_ones_have_gradients_of_zero():
    model = make_model(2).train()
    model(IDS[:, 3:].clamp(max=8), labels=IDS[:, 3:].clamp(max=8)).loss.backward()
    held = dict(model.model.modalities["seen"].named_parameters())
    assert all(parameter.grad is not None and float(parameter.grad.abs().max()) == 0 for parameter in held.values())
    encoder = model.model.modalities["seen"].get_encoder()
    given = encoder.prepare(
        [torch.zeros(8, 16, 3, dtype=torch.uint8)] * 2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    model(IDS, attention_mask=MASK, features={"seen": given}, labels=IDS).loss.backward()
    assert float(held["encoder.network.deepstack_merger_list.1.linear_fc2.weight"].grad.abs().max()) > 0


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="channels 50 of modality 'seen' must be the width of the model"):
        SEEN.replace(channels=50)
    with pytest.raises(ConfigError, match="3 times a width of 20 are 60"):
        SEEN.build(hidden_size=20)
    with pytest.raises(ConfigError, match="leave trains_encoder True"):
        SEEN.replace(trains_encoder=False)
