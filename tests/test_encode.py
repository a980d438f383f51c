"""Features of one modality: those of the model's own forward pass, whatever form the inputs have."""

from __future__ import annotations

import pytest
import torch

from omnimoe.connectors import MLP
from omnimoe.encoders import Features
from omnimoe.inputs import InputError
from omnimoe.modalities import Connected
from tests.declarations import DECLARATIONS, MOT, TEXT, build, with_towers

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def ids_of(config, name, *shape):
    held = config.token_ranges[name]
    return torch.randint(held.start + 8 * (name == "text"), held.stop, shape)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_ids_give_the_hidden_states_of_a_forward(name):
    model = build(DECLARATIONS[name])
    for modality in model.config.token_ranges:
        ids = ids_of(model.config, modality, 2, 5)
        out = model.model(ids, output_hidden_states=True)
        assert torch.equal(model.encode(modality, ids), out.last_hidden_state)
        assert torch.equal(model.model.encode(modality, ids, layer=1), out.hidden_states[1])
        assert torch.equal(model.encode(modality, ids[0]), model.model(ids[:1]).last_hidden_state)


def test_padding_and_pools():
    model = build(MOT)
    ids = ids_of(MOT, "image", 2, 4) * MASK  # padding is an id of text, which is looked past
    found = model.encode("image", ids, attention_mask=MASK)
    short = model.encode("image", ids[1, :2])
    torch.testing.assert_close(found[1, :2], short[0])
    for pool, wanted in (("mean", short.mean(1)), ("last", short[:, -1])):
        pooled = model.encode("image", ids, attention_mask=MASK, pool=pool)
        assert pooled.shape == (2, 16)
        torch.testing.assert_close(pooled[1:], wanted)
        torch.testing.assert_close(model.encode("image", ids[1, :2], pool=pool), wanted)


def test_markers_belong_to_their_span():
    ids = torch.tensor([[3, 25, 26, 27, 28, 4]])
    assert build(MOT).encode("image", ids).shape == (1, 6, 16)


def test_rows_of_a_continuous_modality():
    model = build(DECLARATIONS["transfusion"])
    rows = torch.rand(2, 4, 6)
    given = {"input_ids": torch.full((2, 4), 7), "features": {"latent": rows.flatten(0, 1)}}
    assert torch.equal(model.encode("latent", rows), model.model(**given).last_hidden_state)
    padded = model.encode("latent", rows, attention_mask=MASK)
    torch.testing.assert_close(padded[1, :2], model.encode("latent", rows[1, :2])[0])
    noisy = model.encode("latent", rows[0], timesteps={"latent": torch.ones(4)})
    assert not torch.allclose(noisy, model.encode("latent", rows[0]))


def test_features_of_a_form_of_their_own():
    """Each span is a sequence, however many rows it becomes."""
    seen = Connected.Config(name="seen", channels=5, connector=MLP.Config(), placeholder_id=7)
    model = build(with_towers(MOT.replace(modalities=(TEXT, seen)), "modality"))
    rows = torch.rand(2, 4, 5)
    alone = model.encode("seen", rows)
    whole = model.model(torch.full((1, 4), 7), features={"seen": rows[1:]}).last_hidden_state
    torch.testing.assert_close(alone[1:], whole)
    uneven = model.encode("seen", Features(rows=rows, pooled=rows.mean(1), mask=MASK.bool()), pool="mean")
    torch.testing.assert_close(uneven[0], alone[0].mean(0))
    torch.testing.assert_close(uneven[1:], model.encode("seen", rows[1:, :2], pool="mean"))
    with pytest.raises(InputError, match="say themselves how long they are; drop attention_mask"):
        model.encode("seen", rows, attention_mask=MASK)


def test_by_another_key():
    model = build(with_towers(MOT, (0, 1), keys=("und", "gen")))
    ids = ids_of(MOT, "image", 1, 4)
    keys = torch.ones(1, 4, dtype=torch.int64)
    assert torch.equal(model.encode("image", ids, key="gen"), model.model(ids, key_ids=keys).last_hidden_state)
    with pytest.raises(InputError, match="key None is none of this model, whose copies are picked by und, gen"):
        model.encode("image", ids)


def test_it_has_gradients():
    model = build(MOT)
    model.encode("text", ids_of(MOT, "text", 1, 4), pool="last").sum().backward()
    assert all(weight.grad is not None for name, weight in model.model.named_parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modality": "smell"}, "unknown modality 'smell'; the modalities are text, image, speech"),
        ({"layer": 3}, "layer 3 is none of the hidden states 0 to 2; -1 is the last"),
        ({"pool": "max"}, "pool must be 'mean', 'last' or None, got 'max'"),
        ({"key": "gen"}, "key 'gen' is none of this model, whose copies are those of its modalities"),
        ({"x": torch.tensor([[21, 2]])}, r"x holds 2, and the ids of 'image' are 20 to 31; add config.token_ranges"),
        ({"x": [[21]]}, "x must be a tensor"),
        ({"position_id": None}, "the model takes no argument 'position_id'; did you mean 'position_ids'"),
    ],
    ids=str,
)
def test_what_is_refused(given, message):
    model = build(MOT)
    given = {"modality": "image", "x": torch.tensor([[21, 22]]), **given}
    with pytest.raises(InputError, match=message):
        model.encode(given.pop("modality"), given.pop("x"), **given)


def test_rows_of_no_sequence():
    with pytest.raises(InputError, match=r"rows of 'latent' must be \(B, T, C\) or \(T, C\), got \(6,\)"):
        build(DECLARATIONS["transfusion"]).encode("latent", torch.rand(6))
