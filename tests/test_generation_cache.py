"""Decoding with a cache gives what the full forward gives; generation in a batch gives what it gives alone."""

from __future__ import annotations

import warnings

import pytest
import torch

from omnimoe.inputs import InputError
from omnimoe.layers import MASK_RULES, register_mask_rule
from tests.declarations import CACHED, CAUSAL, DECLARATIONS, DENSE, build, ids_like, with_towers

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 1, 6), (11, 1)], ids=["steps", "chunks", "prompt"])
def test_cached_decoding_equals_the_full_forward(name, chunks):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    wanted, cache, found, start = model(ids).logits, None, [], 0
    with torch.no_grad():
        for size in chunks:
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, **CLOSE)


@pytest.mark.parametrize("name", CACHED)
def test_left_padded_rows_decode_as_they_do_alone(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted, cache, found = model(ids[:1, 4:]).logits, None, []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 12)):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1)[:1, 4:], wanted, **CLOSE)


@pytest.mark.parametrize("name", CACHED)
def test_greedy_generation_equals_a_loop_over_full_forwards(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config, 2, 5)
    wanted = ids
    with torch.no_grad():
        for _ in range(6):
            wanted = torch.cat((wanted, model(wanted).logits[:, -1:].argmax(-1)), 1)
    found = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, free=True)
    assert torch.equal(found, wanted)
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, free=True, use_cache=False), wanted
    )


@pytest.mark.parametrize("name", CACHED)
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config, 3, 8)
    starts = (0, 3, 5)
    mask = torch.ones_like(ids)
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    batch = ids * mask
    together = model.generate(
        batch, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, free=True
    )
    for row, start in enumerate(starts):
        alone = model.generate(
            ids[row : row + 1, start:], max_new_tokens=5, do_sample=False, eos_token_id=None, free=True
        )
        assert torch.equal(together[row, 8:], alone[0, 8 - start :])


@pytest.mark.parametrize("name", ["dense", "mot", "moe"])
def test_a_static_cache_generates_what_a_growing_one_does(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config, 2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    keep = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    for given in (None, mask):
        wanted = model.generate(ids, attention_mask=given, **keep)
        found = model.generate(ids, attention_mask=given, cache_implementation="static", **keep)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("use_cache", [True, False])
def test_modality_ids_of_the_prompt_hold_for_the_prompt_and_the_partition_for_the_rest(length, use_cache):
    config = DECLARATIONS["mot"]
    model, ids = build(config), ids_like(config, 2, length)
    given = (model.model.modality_ids_of(ids) + 1) % 3
    found = model.generate(
        ids, modality_ids=given, max_new_tokens=5, do_sample=False, eos_token_id=None, free=True, use_cache=use_cache
    )
    wanted = ids
    with torch.no_grad():
        for _ in range(5):
            kinds = torch.cat((given, model.model.modality_ids_of(wanted[:, length:])), 1)
            wanted = torch.cat((wanted, model(wanted, modality_ids=kinds).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_with_keys_of_its_own_goes_on_with_the_key_of_the_last_position(use_cache):
    config = with_towers(DENSE, "modality", keys=("und", "gen"))
    model, ids = build(config), ids_like(config, 2, 4)
    keys = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    found = model.generate(
        ids, key_ids=keys, max_new_tokens=4, do_sample=False, eos_token_id=None, free=True, use_cache=use_cache
    )
    wanted = ids
    with torch.no_grad():
        for _ in range(4):
            wanted = torch.cat((wanted, model(wanted, key_ids=keys).logits[:, -1:].argmax(-1)), 1)
            keys = torch.cat((keys, keys[:, -1:]), 1)
    assert torch.equal(found, wanted)


def test_features_of_the_prompt_enter_once_and_generation_goes_on_with_text():
    config = DECLARATIONS["transfusion"]
    model = build(config)
    ids = torch.tensor([[10, 3, 7, 7, 7, 4, 12]])
    rows = torch.randn(3, 6)
    found = model.generate(
        ids, features={"latent": rows}, max_new_tokens=4, do_sample=False, eos_token_id=None, free=True
    )
    wanted = ids
    with torch.no_grad():
        for _ in range(4):
            held = torch.cat(
                (model.model.modality_ids_of(ids), torch.zeros(1, wanted.shape[1] - 7, dtype=torch.int64)), 1
            )
            out = model(wanted, modality_ids=held, features={"latent": rows})
            wanted = torch.cat((wanted, out.logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, wanted)


def test_beams_and_several_samples_run():
    model, ids = build(DECLARATIONS["mot"]), ids_like(DENSE, 2, 5)
    assert model.generate(ids, num_beams=3, max_new_tokens=3, do_sample=False, eos_token_id=None, free=True).shape == (
        2,
        8,
    )
    assert model.generate(
        ids, num_return_sequences=2, max_new_tokens=3, do_sample=True, eos_token_id=None, free=True
    ).shape == (
        4,
        8,
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_declared_causal_does_not_see_the_future(name):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    changed = ids.clone()
    changed[:, 7:] = ids_like(config, seed=5)[:, 7:]
    assert not torch.equal(changed, ids)
    with torch.no_grad():
        first, second = model(ids).logits, model(changed).logits
    torch.testing.assert_close(first[:, :7], second[:, :7], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:, 7:], second[:, 7:], atol=1e-3)


@pytest.mark.parametrize("name", ["moma", "expert_choice", "encoder", "block_causal"])
def test_what_is_not_declared_causal_does_see_the_future(name):
    """The negative of the test above: it can fail, and expert choice without a cache does leak."""
    config = DECLARATIONS[name]
    assert not config.is_causal
    model, differences = build(config), []
    with torch.no_grad():
        for seed in range(8):
            ids = ids_like(config, seed=seed)
            # a picture that goes over the border, for the rule whose blocks are pictures
            ids[:, 6:8] = torch.tensor([25, 26])
            changed = ids.clone()
            changed[:, 7:] = 28
            differences.append((model(ids).logits - model(changed).logits)[:, :7].abs().max())
    assert max(differences) > 1e-3


@pytest.mark.parametrize("name", ["moma", "expert_choice"])
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 7)], ids=["steps", "chunks"])
def test_expert_choice_with_a_cache_sees_no_future(name, chunks):
    config = DECLARATIONS[name]
    model, ids = build(config), ids_like(config)
    changed = ids.clone()
    changed[:, 7:] = ids_like(config, seed=5)[:, 7:]
    with torch.no_grad():
        whole = model(ids, use_cache=True).logits
        torch.testing.assert_close(model(changed, use_cache=True).logits[:, :7], whole[:, :7], atol=1e-5, rtol=1e-5)
        cache, start, found = None, 0, []
        for size in chunks:
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)


def test_a_block_decoded_in_one_chunk_is_bidirectional_with_a_cache_too():
    config = DECLARATIONS["block_causal"]
    model = build(config)
    ids = torch.tensor([[9, 10, 3, 20, 21, 22, 23, 4, 11]])
    with torch.no_grad():
        wanted = model(ids).logits
        out = model(ids[:, :3], use_cache=True)
        picture = model(ids[:, 3:7], past_key_values=out.past_key_values, use_cache=True)
        rest = model(ids[:, 7:], past_key_values=picture.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((out.logits, picture.logits, rest.logits), 1), wanted, **CLOSE)


def test_what_a_cache_cannot_hold_is_refused():
    model, ids = build(DECLARATIONS["one_way"]), ids_like(DENSE)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(InputError, match="'one_way' has no cached decoding"):
        model(ids[:, 4:], past_key_values=cache)

    @register_mask_rule("own_key_test")
    def own_key(query, key):
        return (query.order >= key.order) & (query.key_ids == key.key_ids)

    try:
        model = build(DENSE.replace(mask="own_key_test"))
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(InputError, match="'own_key_test' has no cached decoding, since it reads key_ids"):
            model(ids[:, 4:], past_key_values=cache)
    finally:
        MASK_RULES.remove("own_key_test")
    model = build(DENSE)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(InputError, match="segment_ids pack several documents"):
        model(ids[:, 4:], past_key_values=cache, segment_ids=torch.zeros_like(ids[:, 4:]))
    with pytest.raises(InputError, match="attention_mask must be \\(2, 12\\)"):
        model(ids[:, 4:], past_key_values=cache, attention_mask=torch.ones_like(ids[:, 4:]))


def test_a_prompt_of_embeddings_generates_what_its_ids_do():
    model, ids = build(DECLARATIONS["mot"]), ids_like(DENSE, 2, 6)
    keep = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "free": True}
    embeds, kinds = model.model.embed_tokens(ids), model.model.modality_ids_of(ids)
    found = model.generate(inputs_embeds=embeds, modality_ids=kinds, **keep)
    assert torch.equal(found, model.generate(ids, **keep)[:, 6:])


def test_a_cache_is_refused_where_layers_are_recomputed():
    model, ids = build(DENSE).train(), ids_like(DENSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="fill a cache twice; pass use_cache=False"):
        model(ids, use_cache=True)
    model.eval()
    assert model(ids, use_cache=True).past_key_values is not None
