"""Vectors of inputs by which modalities are compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnimoe import ConfigError, FeedForward, InputError, OmniMoeConfig, OmniMoeForCausalLM, Tokens

CONFIG = OmniMoeConfig(
    hidden_size=32,
    num_layers=1,
    experts=FeedForward.Config(intermediate_size=32),
    modalities=(Tokens.Config(name="text", vocab_size=20), Tokens.Config(name="image", vocab_size=10)),
    mask="bidirectional",
    aligned_size=12,
)


@pytest.fixture(scope="module")
def model() -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    return OmniMoeForCausalLM(CONFIG).eval()


@pytest.mark.parametrize(("name", "low", "place"), [("text", 0, 0), ("image", 20, 1)])
def test_the_first_row_through_the_map_of_its_modality(model, name, low, place):
    ids = torch.randint(low, low + 10, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = model.align(name, ids, attention_mask=mask)
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    first = hidden[torch.arange(3), torch.tensor([0, 2, 0])]
    torch.testing.assert_close(found, F.normalize(first @ model.aligned.weight[place].T, dim=-1))


def test_a_contrast_is_learned(model):
    first, second = (torch.randn(4, 12).requires_grad_() for _ in range(2))
    loss = model.contrast(F.normalize(first, dim=-1), F.normalize(second, dim=-1))
    loss.backward()
    assert model.aligned.logit_scale.grad is not None
    alike = F.normalize(first.detach(), dim=-1)
    assert float(loss.detach()) > float(model.contrast(alike, alike).detach())
    with pytest.raises(InputError, match=r"pairs, got \(4, 12\) and \(3, 12\)"):
        model.contrast(first, second[:3])


def test_maps_take_part_in_every_step_and_are_saved(model, tmp_path):
    ids = torch.randint(0, 20, (2, 6))
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.aligned.weight.grad.any()
    model.save_pretrained(tmp_path)
    again = OmniMoeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.aligned.weight, model.aligned.weight)
    assert torch.equal(again.aligned.logit_scale, model.aligned.logit_scale)


def test_a_model_without_them_says_so():
    plain = OmniMoeForCausalLM(CONFIG.replace(aligned_size=0))
    assert not any(name.startswith("aligned") for name in plain.state_dict())
    with pytest.raises(InputError, match="aligned_size 0"):
        plain.align("text", torch.tensor([[1]]))
    with pytest.raises(InputError, match="aligned_size 0"):
        plain.contrast(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ConfigError, match="aligned_size -1"):
        CONFIG.replace(aligned_size=-1)
