"""Prompts of every form, what may follow them, when it ends, and what ``generate`` gives back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from omnimoe.inputs import InputError, repeated
from omnimoe.layers import Rope
from omnimoe.model import OmniMoeForCausalLM
from tests.contract.loops import GREEDY, KINDS, greedy, log_probs, made
from tests.declarations import DECLARATIONS, DENSE, build, ids_like, with_towers

# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_embeddings_of_a_left_padded_batch_generate_what_its_ids_do(name):
    model, ids = made(name, 2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    embeds, kinds = model.model.embed_tokens(ids), model.model.modality_ids_of(ids)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
    found = model.generate(inputs_embeds=embeds, modality_ids=kinds, attention_mask=mask, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, wanted[:, 7:])
    both = model.generate(
        ids, inputs_embeds=embeds, modality_ids=kinds, attention_mask=mask, max_new_tokens=4, **GREEDY
    )
    assert torch.equal(both, wanted)


def test_embeddings_may_be_searched_with_beams():
    model, ids = made("mot")
    embeds, kinds = model.model.embed_tokens(ids), model.model.modality_ids_of(ids)
    wanted = model.generate(ids, num_beams=3, max_new_tokens=4, **GREEDY)
    found = model.generate(inputs_embeds=embeds, modality_ids=kinds, num_beams=3, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, wanted[:, 5:])


def test_padding_is_seen_without_a_mask_where_the_vocabulary_has_a_token_for_it():
    model, ids = made("moe", 2, 6)
    ids[0, :2] = model.config.pad_token_id
    mask = (ids != model.config.pad_token_id).long()
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, free=True), wanted[:, :10])


def test_without_a_prompt_a_document_begins():
    model = build(DENSE)
    wanted = greedy(model, torch.tensor([[model.config.bos_token_id]]), 4)
    assert torch.equal(model.generate(max_new_tokens=4, **GREEDY), wanted)


@pytest.mark.parametrize(
    "extra", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}], ids=str
)
def test_modalities_and_keys_of_the_prompt_go_along_with_every_sequence(extra):
    config = with_towers(DENSE, "modality", keys=("und", "gen"))
    model, ids = build(config), ids_like(config, 2, 4)
    given = {
        "key_ids": torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]),
        "modality_ids": (model.model.modality_ids_of(ids) + 1) % 3,
    }
    together = model.generate(ids, max_new_tokens=4, **given, **{**GREEDY, **extra})
    each = extra.get("num_return_sequences", 1)
    for row in range(2):
        alone = {name: held[row : row + 1] for name, held in given.items()}
        found = model.generate(ids[row : row + 1], max_new_tokens=4, **alone, **{**GREEDY, **extra})
        assert torch.equal(together[each * row : each * (row + 1)], found)


@pytest.mark.parametrize(
    "extra", [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True, "top_k": 1}], ids=str
)
def test_features_of_the_prompt_go_along_with_every_sequence(extra):
    config = DECLARATIONS["transfusion"]
    model = build(config)
    ids = torch.tensor([[10, 3, 7, 7, 7, 4, 12], [11, 12, 3, 7, 4, 9, 8]])
    rows = torch.randn(4, 6)
    together = model.generate(ids, features={"latent": rows}, max_new_tokens=3, **{**GREEDY, **extra})
    each = extra.get("num_return_sequences", 1)
    for row, part in enumerate((rows[:3], rows[3:])):
        alone = {"latent": part}
        found = model.generate(ids[row : row + 1], features=alone, max_new_tokens=3, **{**GREEDY, **extra})
        assert torch.equal(together[each * row : each * (row + 1)], found)


def test_features_of_which_it_is_not_known_whose_they_are_are_not_repeated():
    assert repeated("features['a']", ["one", "two"], [5], 2) == ["one", "two", "one", "two"]
    assert repeated("features['a']", torch.tensor([1, 2, 3]), [1, 2], 2).tolist() == [1, 1, 2, 3, 2, 3]
    with pytest.raises(
        InputError, match="features\\['a'\\] cannot be repeated for 2 sequences .* one prompt at a time"
    ):
        repeated("features['a']", ["one", "two"], [3, 2], 2)


@pytest.mark.parametrize("axes", [1, 3])
def test_positions_that_are_given_go_along_with_every_sequence(axes):
    rope = Rope.Config(sections=(1, 1, 0)) if axes == 3 else Rope.Config()
    config = DENSE.replace(attention=DENSE.attention.replace(rope=rope))
    model, ids = build(config), ids_like(config, 2, 4)
    positions = torch.randint(0, 9, (2, 4, axes) if axes == 3 else (2, 4))
    together = model.generate(ids, position_ids=positions, num_beams=2, max_new_tokens=3, **GREEDY)
    for row in range(2):
        alone = {"position_ids": positions[row : row + 1], "num_beams": 2}
        assert torch.equal(model.generate(ids[row : row + 1], max_new_tokens=3, **alone, **GREEDY)[0], together[row])
    # they go on by one in every axis
    wanted = ids
    for step in range(3):
        rest = positions[:, -1:] + 1 + torch.arange(step).view(1, -1, *(1,) * (positions.ndim - 2))
        logits = model(wanted, position_ids=torch.cat((positions, rest), 1)).logits[:, -1:]
        wanted = torch.cat((wanted, logits.argmax(-1)), 1)
    assert torch.equal(model.generate(ids, position_ids=positions, max_new_tokens=3, **GREEDY), wanted)


# -- what may follow --------------------------------------------------------------------------------------------------


class Never(LogitsProcessor):
    """Forbids some tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


def test_a_processor_of_ones_own_is_asked_at_every_step():
    model, ids = made("mot")
    chosen = greedy(model, ids, 4)[:, 5:].unique().tolist()
    found = model.generate(ids, logits_processor=LogitsProcessorList([Never(*chosen)]), max_new_tokens=4, **GREEDY)
    assert not set(found[:, 5:].unique().tolist()) & set(chosen)


@pytest.mark.parametrize(
    ("option", "holds"),
    [
        ({"repetition_penalty": 50.0}, lambda new, first: len(set(new)) == len(new)),
        ({"no_repeat_ngram_size": 1}, lambda new, first: len(set(new)) == len(new)),
        ({"bad_words_ids": "first"}, lambda new, first: new[0] != first),
        ({"suppress_tokens": "first"}, lambda new, first: first not in new),
        ({"begin_suppress_tokens": "first"}, lambda new, first: new[0] != first),
        ({"sequence_bias": "first"}, lambda new, first: new[0] != first),
        ({"forced_eos_token_id": 2}, lambda new, first: new[-1] == 2),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [5 + len(ids) % 3]}, lambda new, first: set(new) <= {5, 6, 7}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rules_of_transformers_hold(option, holds):
    model, ids = made("moe", 1)
    first = int(greedy(model, ids, 1)[0, -1])
    forms = {"bad_words_ids": [[first]], "sequence_bias": {(first,): -100.0}}
    option = {name: forms.get(name, [first]) if held == "first" else held for name, held in option.items()}
    new = model.generate(ids, max_new_tokens=16, **option, **GREEDY)[0, 5:].tolist()
    assert holds(new, first)
    plain = model.generate(ids, max_new_tokens=16, **GREEDY)[0, 5:].tolist()
    assert not holds(plain, first), "the rule changed nothing"


@pytest.mark.parametrize("name", ["dense", "mot"])
def test_guidance_of_transformers_own_is_the_mix_of_two_forwards(name):
    model, ids = made(name, 1)
    found = model.generate(ids, guidance_scale=2.0, max_new_tokens=3, **GREEDY)
    wanted, other = ids, ids[:, -1:]
    for _ in range(3):
        with_prompt, without = log_probs(model, wanted), log_probs(model, other)
        token = (without + 2.0 * (with_prompt - without)).argmax(-1, keepdim=True)
        wanted, other = torch.cat((wanted, token), 1), torch.cat((other, token), 1)
    assert torch.equal(found, wanted)


def test_continuous_batching_is_refused_at_once():
    model = build(DENSE)
    with pytest.raises(InputError, match="continuous batching keeps keys and values in pages"):
        model.generate_batch([[9, 10, 11], [12, 13]])


# -- when it ends -----------------------------------------------------------------------------------------------------


def test_each_row_ends_at_any_of_several_tokens_and_is_padded_after():
    model, ids = made("mot", 3)
    free = greedy(model, ids, 8)[:, 5:]
    ends = [int(free[0, 2]), int(free[1, 4])]
    found = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=ends, free=True)[:, 5:]
    for row, wanted in zip(found, free, strict=True):
        at = next((place for place, token in enumerate(wanted.tolist()) if token in ends), 7)
        assert row[: at + 1].tolist() == wanted[: min(at + 1, found.shape[1])].tolist()
        assert (row[at + 1 :] == model.config.pad_token_id).all()


def test_an_end_does_not_come_before_the_fewest_tokens_that_were_asked_for():
    model, ids = made("dense", 1)
    end = int(greedy(model, ids, 1)[0, -1])
    keep = {"do_sample": False, "eos_token_id": end, "free": True, "max_new_tokens": 6}
    assert model.generate(ids, **keep).shape[1] == 6
    late = model.generate(ids, min_new_tokens=4, **keep)[0, 5:].tolist()
    assert end not in late[:4]


class AfterToken(StoppingCriteria):
    """A row is done once the token stands in it."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return (input_ids[:, 5:] == self.token).any(1)


def test_a_criterion_of_ones_own_ends_it():
    model, ids = made("moe", 1)
    stop = AfterToken(int(greedy(model, ids, 3)[0, 7]))
    criteria = StoppingCriteriaList([stop])
    found = model.generate(ids, max_new_tokens=8, stopping_criteria=criteria, **GREEDY)
    assert found.shape[1] <= 8
    assert int(found[0, -1]) == stop.token


# -- what is given back -----------------------------------------------------------------------------------------------


class Noted(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.is_ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.is_ended = True


def test_a_streamer_sees_the_prompt_then_each_token_then_the_end():
    model, ids = made("mot", 1)
    streamer = Noted()
    found = model.generate(ids, streamer=streamer, max_new_tokens=4, **GREEDY)
    assert streamer.parts == [ids[0].tolist(), *([token] for token in found[0, 5:].tolist())]
    assert streamer.is_ended


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_every_step_are_those_of_a_full_forward(name):
    model, ids = made(name)
    out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert len(out.logits) == 4
    with torch.no_grad():
        wanted = model(out.sequences).logits[:, 4:8]
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mot", "moe"])
def test_hidden_states_and_attention_of_every_step(name):
    model, ids = made(name)
    model.set_attn_implementation("eager")
    out = model.generate(
        ids,
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        output_router_logits=True,
        **GREEDY,
    )
    assert [tuple(step[-1].shape) for step in out.hidden_states] == [(2, 5, 16), (2, 1, 16), (2, 1, 16)]
    assert [tuple(step[0].shape) for step in out.attentions] == [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7)]
    whole = model(out.sequences[:, :7], output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.hidden_states[-1][1], whole.hidden_states[1][:, -1:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.attentions[-1][1], whole.attentions[1][:, :, -1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_generates_what_its_own_steps_give(name):
    model, ids = made(name)
    model = model.to(torch.bfloat16)
    out = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **GREEDY)
    cache, given, found = None, ids, ids
    with torch.no_grad():
        for step in out.logits:
            result = model(given, past_key_values=cache, use_cache=True)
            cache, given = result.past_key_values, result.logits[:, -1:].argmax(-1)
            found = torch.cat((found, given), 1)
            torch.testing.assert_close(step, result.logits[:, -1].float())
    assert torch.equal(out.sequences, found)


def test_settings_of_generation_are_saved_and_used_after_loading(tmp_path):
    model, ids = made("mot", 1)
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=[2, 30], pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = OmniMoeForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [2, 30]
    found = loaded.generate(ids, free=True)
    assert found.shape[1] <= 8
    given = GenerationConfig(max_new_tokens=5, pad_token_id=0, do_sample=False)
    assert torch.equal(
        loaded.generate(ids, given, free=True, eos_token_id=None), model.generate(ids, max_new_tokens=5, **GREEDY)
    )


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_a_model_whose_tokens_see_later_ones_does_not_generate(options):
    model, ids = build(DECLARATIONS["encoder"]), ids_like(DECLARATIONS["encoder"])
    with pytest.raises(InputError, match="under the mask rule 'bidirectional' a token depends on later ones"):
        model.generate(ids, max_new_tokens=2, do_sample=False, **options)
