"""Seeds against transformers: tiny random models, published to a folder and loaded from it."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omnimoe import OmniMoeForCausalLM, convert_checkpoint, from_pretrained
from tests.zoo.seeds.tiny import CASES, VARIANTS, VOCAB, publish, published_model
from tests.zoo.weights import assert_same_tensors, stored

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model, its folder, and the same folder as a model of ours."""
    theirs = published_model(request.param)
    folder = publish(theirs, tmp_path_factory.mktemp(request.param))
    return theirs, folder, from_pretrained(folder)


def ids_of(batch_size: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(length))


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert torch.isfinite(theirs).all()
    assert float((ours - theirs).norm() / theirs.norm()) < TOLERANCE


@torch.no_grad()
def test_logits(pair):
    theirs, _, ours = pair
    assert isinstance(ours, OmniMoeForCausalLM)
    assert not ours.training
    ids = ids_of()
    wanted = theirs(ids).logits
    assert_near(ours(ids).logits, wanted)
    assert not torch.allclose(wanted[:, 0], wanted[:, 1], atol=0.1), "the model reads its input"


@torch.no_grad()
def test_hidden_states_of_every_layer(pair):
    theirs, _, ours = pair
    ids = ids_of()
    wanted = theirs(ids, output_hidden_states=True).hidden_states
    found = ours(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert_near(mine, other)


@torch.no_grad()
def test_cached_steps(pair):
    theirs, _, ours = pair
    ids = ids_of()
    whole = theirs(ids).logits
    mine, other = ours(ids[:, :7], use_cache=True), theirs(ids[:, :7], use_cache=True)
    assert_near(mine.logits, whole[:, :7])
    for at in range(7, ids.shape[1]):
        step = ids[:, at : at + 1]
        mine = ours(step, past_key_values=mine.past_key_values)
        other = theirs(step, past_key_values=other.past_key_values)
        assert_near(mine.logits, other.logits)
        assert_near(mine.logits[:, 0], whole[:, at])


@torch.no_grad()
def test_cached_steps_of_a_padded_batch(pair):
    theirs, _, ours = pair
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = theirs(ids, attention_mask=mask, position_ids=positions).logits
    cache = None
    for start, stop in itertools.pairwise([0, 7, *range(8, ids.shape[1] + 1)]):
        out = ours(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache, real = out.past_key_values, mask[:, start:stop].bool()
        assert_near(out.logits[real], whole[:, start:stop][real])


@torch.no_grad()
def test_left_padding(pair):
    theirs, _, ours = pair
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    wanted = theirs(ids, attention_mask=mask, position_ids=positions).logits
    found = ours(ids, attention_mask=mask, position_ids=positions).logits
    assert_near(found[mask.bool()], wanted[mask.bool()])
    alone = ours(ids[1:, 5:]).logits
    assert_near(found[1, 5:], alone[0])


def test_greedy_generation_of_a_padded_batch(pair):
    theirs, _, ours = pair
    ids = ids_of(length=6)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


def test_beams_a_static_cache_and_attention_weights(pair):
    theirs, _, ours = pair
    ids = ids_of(length=6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, num_beams=3, **options), theirs.generate(ids, num_beams=3, **options))
    greedy = ours.generate(ids, **options)
    assert torch.equal(ours.generate(ids, cache_implementation="static", **options), greedy)
    ours.set_attn_implementation("eager")
    with torch.no_grad():
        found, wanted = (model(ids, output_attentions=True).attentions for model in (ours, theirs))
    ours.set_attn_implementation("sdpa")
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [None, slice(0, 5), slice(-5, None)], ids=["none", "left", "right"])
def test_gradients(pair, padding, tmp_path):
    """Their gradients, published as if they were weights, are ours."""
    theirs, _, ours = pair
    ids = ids_of()
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, padding] = 0
    positions, real = (mask.cumsum(1) - 1).clamp_min(0), mask.bool()
    labels = ids.masked_fill(~real, -100)[:, 1:][real[:, :-1]]
    for model in (ours, theirs):
        model.zero_grad()
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        torch.nn.functional.cross_entropy(logits[:, :-1][real[:, :-1]], labels).backward()
    twin = published_model(next(name for name, (kind, _) in CASES.items() if kind == theirs.config.model_type))
    with torch.no_grad():
        for held, other in zip(twin.parameters(), theirs.parameters(), strict=True):
            held.copy_(torch.zeros_like(held) if other.grad is None else other.grad)
    wanted = from_pretrained(publish(twin, tmp_path))
    for (name, mine), (_, other) in zip(ours.named_parameters(), wanted.named_parameters(), strict=True):
        assert mine.grad is not None, name
        scale = max(float(other.detach().norm()), 1e-6)
        assert float((mine.grad - other.detach()).norm()) / scale < TOLERANCE, name


@pytest.mark.parametrize("size", ["5GB", 20_000])
def test_the_way_there_and_back_keeps_every_bit(pair, tmp_path, size):
    theirs, folder, ours = pair
    there = convert_checkpoint(folder, tmp_path / "ours", max_shard_size=size)
    assert there.family == theirs.config.model_type
    again = from_pretrained(tmp_path / "ours")
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())

    back = convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    assert back.num_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert_same_tensors(stored(tmp_path / "back"), stored(folder))
    convert_checkpoint(ours, tmp_path / "model", to="published")
    assert_same_tensors(stored(tmp_path / "model"), stored(folder))
    assert type(theirs).from_pretrained(tmp_path / "back").config.to_dict() == type(theirs).from_pretrained(
        folder
    ).config.to_dict() | {"_name_or_path": str(tmp_path / "back")}


def test_a_copy_in_bfloat16(pair, tmp_path):
    theirs, _, ours = pair
    half = type(theirs)(theirs.config).to(torch.bfloat16)
    half.load_state_dict(theirs.state_dict())
    folder = publish(half, tmp_path / "half")
    loaded = from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in ours.named_parameters():
        assert torch.equal(loaded.get_parameter(name), tensor.to(torch.bfloat16)), name
    assert from_pretrained(folder, dtype="float32").dtype == torch.float32
    convert_checkpoint(folder, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    assert_same_tensors(stored(tmp_path / "back"), stored(folder))


@pytest.mark.parametrize("case", VARIANTS)
@torch.no_grad()
def test_choices_of_a_config(case, tmp_path):
    theirs = published_model(case)
    ours = from_pretrained(publish(theirs, tmp_path / "theirs"))
    ids = ids_of(length=40)
    assert_near(ours(ids).logits, theirs(ids).logits)
    convert_checkpoint(ours, tmp_path / "back", to="published")
    assert_same_tensors(stored(tmp_path / "back"), stored(tmp_path / "theirs"))


def test_a_prompt_as_embeddings(pair):
    theirs, _, ours = pair
    ids = ids_of()
    with torch.no_grad():
        embedded = theirs.get_input_embeddings()(ids)
        assert_near(ours(inputs_embeds=embedded).logits, theirs(inputs_embeds=embedded).logits)
