"""Key rules: the copies that a row meets by what else stands in its sequence."""

from __future__ import annotations

import pytest
import torch

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, Tokens
from omnimoe.config import ConfigError
from omnimoe.experts import FeedForward
from omnimoe.inputs import InputError
from omnimoe.layers import Attention, register_key_rule
from omnimoe.layers.keys import joint
from omnimoe.registry import RegistryError

KEYS = ("text", "image", "joint_text", "joint_image")
CONFIG = OmniMoeConfig(
    hidden_size=16,
    num_layers=1,
    modalities=(Tokens.Config(name="text", vocab_size=20), Tokens.Config(name="image", vocab_size=10)),
    attention=Attention.Config(num_heads=2),
    experts=FeedForward.Config(intermediate_size=24, towers=(0, 1, 2, 2)),
    keys=KEYS,
    key_rule="joint",
)


def test_joint_where_a_sequence_has_several_modalities():
    kinds = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 1, 0]])
    assert joint(kinds, 2, None, None).tolist() == [[2, 2, 3], [0, 0, 0], [3, 3, 2]]
    valid = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    assert joint(kinds, 2, valid, None).tolist()[0][:2] == [0, 0], "padding counts for nothing"
    documents = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 1]])
    assert joint(kinds, 2, None, documents).tolist() == [[0, 2, 3], [0, 0, 0], [1, 1, 0]]


def test_a_model_derives_its_keys_and_takes_others():
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(CONFIG).eval()
    ids = torch.tensor([[1, 2, 20, 21], [3, 4, 5, 6]])
    with torch.no_grad():
        found = model(ids).logits
        asked = model(ids, key_ids=torch.tensor([[2, 2, 3, 3], [0] * 4])).logits
        alone = model(ids, key_ids=torch.tensor([[0, 0, 1, 1], [0] * 4])).logits
        derived, own, joint_one = (model.encode("text", ids[1:], key=key) for key in (None, "text", "joint_text"))
    torch.testing.assert_close(derived, own)
    torch.testing.assert_close(found, asked)
    torch.testing.assert_close(found[1], alone[1])
    for one, other in ((derived, joint_one), (found[0], alone[0])):
        assert float((one - other).abs().max()) > 1e-4
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="key rule 'joint' looks at whole sequences"):
        model(ids[:, :1], past_key_values=past)


def test_a_rule_of_ones_own():
    @register_key_rule("all_first")
    def all_first(modality_ids, num_modalities, valid, segment_ids):
        return torch.zeros_like(modality_ids)

    model = OmniMoeForCausalLM(
        CONFIG.replace(keys=(), key_rule="all_first", experts=FeedForward.Config(intermediate_size=24, towers=(0, 1)))
    )
    out = model(torch.tensor([[1, 20]]))
    assert out.rows.key_ids.tolist() == [0, 0]
    with pytest.raises(RegistryError, match="all_first"):
        register_key_rule("all_first")(joint)


def test_keys_that_do_not_fit_the_rule():
    with pytest.raises(ConfigError, match="needs 4 keys for the modalities"):
        CONFIG.replace(keys=("a", "b", "c"), experts=FeedForward.Config(intermediate_size=24))
    with pytest.raises(RegistryError, match="jiont"):
        CONFIG.replace(key_rule="jiont")
