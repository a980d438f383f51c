"""``generate`` in every mode that transformers has, against loops over full forwards.

What a cache, padding and a cache of fixed size give in greedy decoding is in ``tests/test_generation_cache.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from omnimoe.inputs import InputError
from omnimoe.model import OmniMoeForCausalLM
from tests.contract.loops import FREE, GREEDY, KINDS, greedy, log_probs, made
from tests.declarations import DECLARATIONS, DENSE, build


def beams(model: OmniMoeForCausalLM, prompt: Tensor, width: int, count: int) -> tuple[Tensor, Tensor]:
    """The best ``width`` continuations of one prompt ``(1, T)`` that a beam search without an end finds."""
    ids, scores = prompt, torch.zeros(1)
    for _ in range(count):
        each = (scores[:, None] + log_probs(model, ids)).flatten()
        scores, chosen = each.topk(width)
        size = len(each) // len(ids)
        ids = torch.cat((ids[chosen // size], (chosen % size)[:, None]), 1)
    return ids, scores


# -- beams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_beams_find_what_a_search_over_full_forwards_finds(name, use_cache):
    model, ids = made(name)
    found = model.generate(
        ids,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=4,
        length_penalty=0.0,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    for row in range(2):
        wanted, scores = beams(model, ids[row : row + 1], 3, 4)
        assert torch.equal(found.sequences[3 * row : 3 * row + 3], wanted)
        torch.testing.assert_close(found.sequences_scores[3 * row : 3 * row + 3], scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mot", "moe"])
def test_beams_of_a_left_padded_batch_are_those_of_each_prompt_alone(name):
    model, ids = made(name, 2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    together = model.generate(ids * mask, attention_mask=mask, num_beams=3, max_new_tokens=4, **GREEDY)
    for row, start in enumerate((3, 0)):
        alone = model.generate(ids[row : row + 1, start:], num_beams=3, max_new_tokens=4, **GREEDY)
        assert torch.equal(together[row, 7:], alone[0, 7 - start :])


def test_beams_in_a_cache_of_fixed_size_are_the_same():
    model, ids = made("mot")
    wanted = model.generate(ids, num_beams=3, max_new_tokens=4, **GREEDY)
    found = model.generate(
        ids, num_beams=3, max_new_tokens=4, cache_implementation="static", disable_compile=True, **GREEDY
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_beams_with_sampling_repeat_with_the_seed_and_differ_without(name):
    model, ids = made(name)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids, num_beams=3, do_sample=True, temperature=3.0, max_new_tokens=6, **FREE))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (2, 11)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_as_the_model_says():
    model, ids = made("mot", 1)
    wanted = log_probs(model, ids)[0].exp()
    torch.manual_seed(0)
    drawn = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=4000, **FREE)[:, -1]
    found = torch.bincount(drawn, minlength=len(wanted)) / 4000
    assert (found - wanted).abs().max() < 0.03


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"top_p": 1e-4}, {"min_p": 0.9999}, {"temperature": 1e-4}], ids=str)
def test_sampling_among_one_is_greedy(choice):
    model, ids = made("moe")
    found = model.generate(ids, do_sample=True, max_new_tokens=5, **choice, **FREE)
    assert torch.equal(found, greedy(model, ids, 5))


def test_several_samples_of_each_prompt_stand_together_and_start_with_it():
    model, ids = made("mot", 3)
    found = model.generate(ids, do_sample=True, num_return_sequences=4, max_new_tokens=3, **FREE)
    assert torch.equal(found[:, :5], ids.repeat_interleave(4, 0))
    assert len({tuple(row) for row in found[:4].tolist()}) > 1


# -- drafts -----------------------------------------------------------------------------------------------------------


class Calls:
    """Counts the forwards of a model and the positions that each got."""

    def __init__(self, model: OmniMoeForCausalLM) -> None:
        self.lengths: list[int] = []
        model.model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, given, named) -> None:
        self.lengths.append(named["input_ids"].shape[1])


@pytest.mark.parametrize("name", KINDS)
def test_a_draft_of_another_model_changes_nothing_but_the_number_of_steps(name):
    model, ids = made(name, 1)
    wanted = greedy(model, ids, 8)
    calls = Calls(model)
    other = build(DENSE, seed=7)
    assert torch.equal(model.generate(ids, assistant_model=other, max_new_tokens=8, **GREEDY), wanted)
    calls.lengths.clear()
    same = build(DECLARATIONS[name])
    assert torch.equal(model.generate(ids, assistant_model=same, max_new_tokens=8, **GREEDY), wanted)
    assert len(calls.lengths) < 8, "drafts of the model itself are all taken"
    assert max(calls.lengths[1:]) > 1


@pytest.mark.parametrize("name", ["dense", "mot", "moe"])
def test_a_draft_looked_up_in_the_prompt_changes_nothing(name):
    model, _ = made(name)
    ids = torch.tensor([[9, 10, 11, 24, 25, 9, 10, 11, 24, 25, 9, 10]])
    found = model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=8, **GREEDY)
    assert torch.equal(found, greedy(model, ids, 8))


def test_drafts_and_sampling_go_together():
    model, ids = made("mot", 1)
    torch.manual_seed(0)
    found = model.generate(ids, assistant_model=build(DENSE, seed=7), do_sample=True, max_new_tokens=8, **FREE)
    assert found.shape == (1, 13)
    assert torch.equal(found[:, :5], ids)


def test_a_draft_of_the_first_layers_is_refused_and_changes_nothing():
    model, ids = made("mot", 1)
    wanted = greedy(model, ids, 3)
    for given in ({"assistant_early_exit": 1}, {"generation_config": GenerationConfig(assistant_early_exit=1)}):
        with pytest.raises(InputError, match="assistant_early_exit=1 .* pass a smaller model as assistant_model="):
            model.generate(ids, max_new_tokens=3, **given, **GREEDY)
    assert model.config.num_layers == 2
    assert torch.equal(model.generate(ids, max_new_tokens=3, **GREEDY), wanted)


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_goes_on_from_the_cache_it_left(name, kind):
    model, ids = made(name)
    wanted = greedy(model, ids, 6)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=3, **GREEDY)
    assert int(cache.get_seq_length()) == 7  # all but the last token
    calls = Calls(model)
    given = {"attention_mask": torch.ones_like(first), "past_key_values": cache}
    assert torch.equal(model.generate(first, max_new_tokens=3, **given, **GREEDY), wanted)
    assert calls.lengths == [1, 1, 1], "what the cache holds is not read again"


@pytest.mark.parametrize("name", ["mot", "moe", "moma_top_k"])
def test_a_long_prompt_may_be_read_in_chunks(name):
    model, ids = made(name, 2, 11)
    wanted = greedy(model, ids, 4)
    calls = Calls(model)
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, max_new_tokens=4, **GREEDY), wanted)
    assert calls.lengths == [4, 4, 3, 1, 1, 1]


def test_a_cache_holds_every_layer():
    model, ids = made("mot_hybrid")
    out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    assert len(out.past_key_values.layers) == 3
    assert {tuple(layer.keys.shape) for layer in out.past_key_values.layers} == {(2, 2, 7, 4)}
