"""What a caller may pass, and the one sentence that tells what was wrong with the rest."""

from __future__ import annotations

import pytest
import torch

from omnimoe.inputs import InputError, rotary_positions, valid_positions
from tests.declarations import DECLARATIONS, DENSE, MOT, build, ids_like, with_towers
from tests.refusals import refused, unchanged

IDS = ids_like(DENSE)


@pytest.fixture(scope="module")
def model():
    return build(MOT)


@pytest.fixture(scope="module")
def latent():
    return build(DECLARATIONS["transfusion"])


BAD = {
    "neither": ({}, "exactly one of input_ids and inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 12, 16)}, "exactly one of input_ids and inputs_embeds"),
    "flat": ({"input_ids": IDS[0]}, "input_ids must be (B, T), got (12,)"),
    "flat embeds": ({"inputs_embeds": torch.zeros(2, 12)}, "inputs_embeds must be (B, T, D), got (2, 12)"),
    "narrow embeds": (
        {"inputs_embeds": torch.zeros(2, 12, 8), "modality_ids": torch.zeros(2, 12, dtype=torch.int64)},
        "inputs_embeds must be (B, T, 16), got (2, 12, 8)",
    ),
    "empty": ({"input_ids": IDS[:, :0]}, "the sequence is empty"),
    "too large an id": (
        {"input_ids": IDS.clone().fill_(40)},
        "input_ids holds 40, outside [0, 40); the vocabulary has 40",
    ),
    "a huge id": ({"input_ids": IDS.clone().fill_(2**62)}, "input_ids holds 4611686018427387904, outside [0, 40)"),
    "a negative id": ({"input_ids": IDS - 40}, "outside [0, 40)"),
    "floating ids": ({"input_ids": IDS.float()}, "input_ids must be int64, got torch.float32; convert it with .long()"),
    "a list": (
        {"input_ids": IDS, "modality_ids": [[0] * 12] * 2},
        "modality_ids must be an integer tensor of shape (2, 12)",
    ),
    "an unknown modality": (
        {"input_ids": IDS, "modality_ids": torch.full_like(IDS, 3)},
        "modality_ids holds 3, outside [0, 3); the modalities are 0 text, 1 image, 2 speech",
    ),
    "floating modality ids": (
        {"input_ids": IDS, "modality_ids": torch.zeros_like(IDS, dtype=torch.float32)},
        "modality_ids must be int64, got torch.float32; convert it with .long()",
    ),
    "a negative modality": ({"input_ids": IDS, "modality_ids": torch.full_like(IDS, -1)}, "modality_ids holds -1"),
    "short modality ids": ({"input_ids": IDS, "modality_ids": IDS[:, :5]}, "modality_ids must have shape (2, 12)"),
    "short key ids": ({"input_ids": IDS, "key_ids": IDS[:1]}, "key_ids must have shape (2, 12)"),
    "an unknown key": ({"input_ids": IDS, "key_ids": torch.full_like(IDS, 9)}, "key_ids holds 9, outside [0, 3)"),
    "short segments": ({"input_ids": IDS, "segment_ids": IDS[:, :5]}, "segment_ids must have shape (2, 12)"),
    "bad segments": ({"input_ids": IDS, "segment_ids": torch.full_like(IDS, -2)}, "segment_ids holds -2"),
    "short blocks": ({"input_ids": IDS, "block_ids": IDS[:, :5]}, "block_ids must have shape (2, 12)"),
    "short mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 11)}, "attention_mask must be (2, 12)"),
    "mask of another batch": (
        {"input_ids": IDS, "attention_mask": torch.ones(3, 12)},
        "attention_mask must be (2, 12)",
    ),
    "square mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 12, 12)}, "attention_mask must be (2, 12)"),
    "long mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 40)}, "attention_mask must be (2, 12)"),
    "a mask as a list": (
        {"input_ids": IDS, "attention_mask": [[1] * 12] * 2},
        "attention_mask must be a tensor (2, 12), got list",
    ),
    "short positions": ({"input_ids": IDS, "position_ids": IDS[:, :5]}, "position_ids must be (2, 12)"),
    "flat positions": ({"input_ids": IDS, "position_ids": IDS[0]}, "position_ids must be (2, 12)"),
    "positions of another batch": ({"input_ids": IDS, "position_ids": IDS.repeat(2, 1)}, "got (4, 12)"),
    "negative positions": ({"input_ids": IDS, "position_ids": IDS - 50}, "positions count from 0"),
    "half positions": ({"input_ids": IDS, "position_ids": IDS.half()}, "position_ids must be int64, or float32"),
    "positions as a list": ({"input_ids": IDS, "position_ids": [0]}, "position_ids must be a tensor (2, 12)"),
    "ids as a list": ({"input_ids": IDS.tolist()}, "input_ids must be a tensor (B, T), got list"),
    "labels as a list": ({"input_ids": IDS, "labels": IDS.tolist()}, "labels must be a tensor (2, 12), got list"),
    "deep modality ids": (
        {"input_ids": IDS, "modality_ids": torch.zeros(2, 12, 3, dtype=torch.int64)},
        "modality_ids must have shape (2, 12), as input_ids, got (2, 12, 3)",
    ),
    "features without a name": ({"input_ids": IDS, "features": torch.zeros(1, 6)}, "features must be a mapping"),
    "features as a list": ({"input_ids": IDS, "features": {"video": [1.0]}}, "features['video'] must be a tensor"),
    "targets without a name": ({"input_ids": IDS, "targets": torch.zeros(1, 6)}, "targets must be a mapping"),
    "short labels": ({"input_ids": IDS, "labels": IDS[:, :5]}, "labels must be (2, 12), as the logits, got (2, 5)"),
    "too large a label": (
        {"input_ids": IDS, "labels": torch.full_like(IDS, 40)},
        "labels holds 40, outside [0, 40); -100",
    ),
    "a negative label": ({"input_ids": IDS, "labels": torch.full_like(IDS, -1)}, "labels holds -1"),
    "labels of part of the logits": ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 2}, "labels must be (2, 2)"),
    "features of an unknown modality": (
        {"input_ids": IDS, "features": {"video": torch.zeros(1, 6)}},
        "unknown modality 'video'; the modalities are text, image, speech",
    ),
    "features of a discrete modality": (
        {"input_ids": IDS, "features": {"image": torch.zeros(1, 6)}},
        "features for 'image', but the continuous modalities are none",
    ),
    "embeds without modalities": ({"inputs_embeds": torch.zeros(2, 12, 16)}, "pass modality_ids"),
}


HAZARDS = {
    19: ("empty",),
    21: ("too large an id", "a huge id", "a negative id", "too large a label", "a negative label", "bad segments"),
    22: (
        *("an unknown modality", "a negative modality", "floating modality ids", "a list", "short modality ids"),
        *("deep modality ids", "features of an unknown modality", "features of a discrete modality"),
        *("embeds without modalities", "too few", "too many", "too wide", "a batch of them", "text"),
    ),
}
"""Rows of tests/hazard_rows.py, and the cases here that are theirs."""


def marked(cases: dict) -> list:
    rows = {case: [pytest.mark.hazard(row) for row, names in HAZARDS.items() if case in names] for case in cases}
    return [pytest.param(case, marks=rows[case]) for case in cases]


@pytest.mark.parametrize("case", marked(BAD))
def test_bad_input_is_refused_with_the_value_and_the_remedy(model, case):
    given, message = BAD[case]
    with refused((model, given, lambda: model(IDS).logits), message, InputError):
        model(**given)


LATENT_IDS = torch.tensor([[10, 3, 7, 7, 4, 12]])
BAD_FEATURES = {
    "too few": (
        {"features": {"latent": torch.zeros(1, 6)}},
        "one row for each of the 2 positions whose modality is 'latent'",
    ),
    "too many": ({"features": {"latent": torch.zeros(3, 6)}}, "got (3, 6)"),
    "too wide": ({"features": {"latent": torch.zeros(2, 7)}}, "features['latent'] must be (2, 6), got (2, 7)"),
    "a batch of them": ({"features": {"latent": torch.zeros(1, 2, 6)}}, "features['latent'] must be (n, C)"),
    "text": (
        {"features": {"text": torch.zeros(4, 6)}},
        "features for 'text', but the continuous modalities are ['latent']",
    ),
    "times of nothing": ({"timesteps": {"latent": torch.zeros(2)}}, "timesteps for ['latent'] without features"),
    "times of too few": (
        {"features": {"latent": torch.zeros(2, 6)}, "timesteps": {"latent": torch.zeros(1)}},
        "timesteps['latent'] must be (2,), got (1,)",
    ),
    "targets of nothing": ({"targets": {"latent": torch.zeros(2, 6)}}, "targets for 'latent' without features"),
    "targets of another shape": (
        {"features": {"latent": torch.zeros(2, 6)}, "targets": {"latent": torch.zeros(1, 6)}},
        "targets['latent'] must be (2, 6), got (1, 6)",
    ),
}


@pytest.mark.parametrize("case", marked(BAD_FEATURES))
def test_bad_features_are_refused(latent, case):
    given, message = BAD_FEATURES[case]
    fitting = {"input_ids": LATENT_IDS, "features": {"latent": torch.ones(2, 6)}}
    with refused((latent, given, lambda: latent(**fitting).logits), message, InputError):
        latent(LATENT_IDS, **given)


def test_a_model_with_keys_of_its_own_asks_for_them():
    model = build(with_towers(DENSE, "modality", keys=("und", "gen")))
    with pytest.raises(InputError, match="copies are picked by the keys \\('und', 'gen'\\); pass key_ids"):
        model(IDS)
    with pytest.raises(InputError, match="key_ids holds 2, outside \\[0, 2\\); the keys are und, gen"):
        model(IDS, key_ids=torch.full_like(IDS, 2))


@pytest.mark.hazard(19)
@pytest.mark.parametrize("name", ["dense", "mot", "moma", "moe"])
def test_a_batch_of_no_rows_gives_no_logits(name):
    model = build(DECLARATIONS[name])
    with unchanged(model):
        assert model(IDS[:0]).logits.shape == (0, 12, 40)


@pytest.mark.hazard(19)
@pytest.mark.parametrize("name", ["dense", "mot", "moma", "moe", "expert_choice"])
def test_a_batch_of_padding_alone_gives_zeros_and_no_loss(name):
    model = build(DECLARATIONS[name])
    with unchanged(model.state_dict()):
        out = model(IDS, attention_mask=torch.zeros_like(IDS), labels=IDS)
        out.loss.backward()
    assert not out.logits.any()
    assert out.loss == 0


@pytest.mark.parametrize("name", ["dense", "mot", "moma", "moe", "expert_choice", "merged", "chameleon"])
def test_ids_of_32_bits_are_as_good(name):
    model = build(DECLARATIONS[name])
    wanted = model(IDS, labels=IDS)
    kinds = model.model.modality_ids_of(IDS)
    found = model(IDS.int(), modality_ids=kinds.int(), key_ids=kinds.int(), labels=IDS.int())
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.loss, wanted.loss)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_attention_masks_of_any_dtype_are_as_good(model, dtype):
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    assert torch.equal(model(IDS, attention_mask=mask.to(dtype)).logits, model(IDS, attention_mask=mask).logits)


def test_segments_and_a_mask_together_both_mark_padding(model):
    mask, segments = torch.ones_like(IDS), torch.zeros_like(IDS)
    mask[0, :3] = 0
    segments[0, 10:] = -1
    out = model(IDS, attention_mask=mask, segment_ids=segments)
    assert not out.logits[0, :3].any()
    assert not out.logits[0, 10:].any()
    torch.testing.assert_close(out.logits[:1, 3:10], model(IDS[:1, 3:10]).logits, atol=1e-5, rtol=1e-4)


def test_one_token_is_a_sequence(model):
    out = model(IDS[:, :1], labels=IDS[:, :1])
    assert out.logits.shape == (2, 1, 40)
    assert out.loss == 0


def test_a_strided_batch_is_accepted(model):
    assert torch.equal(model(IDS.t().contiguous().t()).logits, model(IDS).logits)


def test_rotary_positions_go_on_after_a_cache_and_start_again_in_each_segment():
    cpu = torch.device("cpu")
    assert rotary_positions(None, None, 2, 3, 4, cpu).squeeze(-1).tolist() == [[3, 4, 5, 6]] * 2
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [5, 7, 7, 7, -1, -1]])
    found = rotary_positions(None, segments, 2, 0, 6, cpu)
    assert found.squeeze(-1).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    grid = torch.randint(0, 9, (2, 6, 3))
    assert torch.equal(rotary_positions(grid, segments, 2, 0, 6, cpu), grid)


def test_places_are_valid_by_the_mask_and_the_segments_together():
    mask, segments = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, -1]])
    assert valid_positions(mask, segments, 1, 0, 4).tolist() == [[False, True, True, False]]
    assert valid_positions(mask, None, 1, 2, 2).tolist() == [[False, True, True, True]]
    assert valid_positions(torch.ones(1, 4), None, 1, 0, 4) is None
    assert valid_positions(None, segments.clamp_min(0), 1, 0, 4) is None


SLIPS = {
    "modality_id": "the model takes no argument 'modality_id'; did you mean 'modality_ids'?",
    "attn_mask": "the model takes no argument 'attn_mask'; did you mean 'attention_mask'?",
    "head_ids": "the model takes no argument 'head_ids'; did you mean",
    "zzz": "the model takes no argument 'zzz'; the arguments are input_ids, modality_ids",
}


@pytest.mark.parametrize("name", SLIPS)
@pytest.mark.parametrize("inner", [False, True])
def test_an_argument_that_nothing_reads_is_refused(model, name, inner):
    with pytest.raises(InputError) as caught:
        (model.model if inner else model)(IDS, **{name: torch.zeros_like(IDS)})
    assert SLIPS[name] in str(caught.value)


def test_what_transformers_passes_to_every_model_is_taken(model):
    wanted = model(IDS, labels=IDS).loss
    passed = {"return_dict": True, "cache_position": torch.arange(12), "num_items_in_batch": torch.tensor(22)}
    torch.testing.assert_close(model(IDS, labels=IDS, **passed).loss, wanted)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3


PROMPTS = {
    "flat": ({"input_ids": IDS[0]}, "the prompt must be (B, T), got (12,)"),
    "empty": ({"input_ids": IDS[:, :0]}, "the prompt is empty: it has shape (2, 0)"),
    "short modality ids": (
        {"input_ids": IDS, "modality_ids": torch.zeros(2, 5, dtype=torch.int64)},
        "modality_ids must have shape (2, 12), as the prompt, got (2, 5)",
    ),
    "key ids of another batch": (
        {"input_ids": IDS, "key_ids": torch.zeros(1, 12, dtype=torch.int64)},
        "key_ids must have shape (2, 12), as the prompt, got (1, 12)",
    ),
    "block ids as a list": ({"input_ids": IDS, "block_ids": [[0] * 12] * 2}, "block_ids must be a tensor (2, 12)"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_generation_cannot_start_from_are_refused(model, case):
    given, message = PROMPTS[case]
    with pytest.raises(InputError) as caught:
        model.generate(**given, max_new_tokens=2)
    assert message in str(caught.value)
