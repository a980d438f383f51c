"""Guidance: equal to a plain loop over two full forwards, row by row, whatever the batch, the cache and the search."""

from __future__ import annotations

import pytest
import torch

from omnimoe.spans import GuidanceProcessor, SpanError, SpanProcessor, span_processors
from tests.declarations import CAUSAL, DECLARATIONS, DENSE, TEXT, build, with_towers

PAD, BOS, EOS, BEGIN_IMAGE, END_IMAGE, BEGIN_SPEECH, END_SPEECH = range(7)
SPAN = {"image": BEGIN_IMAGE, "speech": BEGIN_SPEECH}


def guided(model, prompt: list[int], scale: dict[str, float], steps: int) -> list[int]:
    """Greedy decoding of one row by two whole forwards a step."""
    grammar, ids = SpanProcessor(model.config), list(prompt)
    for _ in range(steps):
        logits = model(torch.tensor([ids])).logits[:, -1]
        last = max(place for place, token in enumerate(ids) if token in range(1, 7))
        name = {begin: name for name, begin in SPAN.items()}.get(ids[last])
        if name in scale and len(ids) - 1 - last < (4 if name == "image" else 1000):
            plain = model(torch.tensor([[BOS, *ids[last:]]])).logits[:, -1]
            logits = plain + scale[name] * (logits - plain)
        ids.append(int(grammar(torch.tensor([ids]), logits).argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


PROMPTS = [[BOS, 9, 11, 12, BEGIN_IMAGE], [BOS, 8, BEGIN_SPEECH], [BOS, 13, 14, 15, 16, BEGIN_IMAGE, 20, 21], [BOS, 9]]


def batch() -> dict[str, torch.Tensor]:
    length = max(map(len, PROMPTS))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in PROMPTS]),
    }


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "transfusion"])
@pytest.mark.parametrize("scale", [{"image": 3.0}, {"image": 3.0, "speech": 2.0}, {"speech": 0.0}], ids=str)
@torch.no_grad()
def test_a_ragged_batch_equals_two_whole_forwards_a_step(name, scale):
    model = build(DECLARATIONS[name])
    made = model.generate(
        **batch(), max_new_tokens=16, do_sample=False, guidance=scale, use_cache=DECLARATIONS[name].mask == "causal"
    )
    for row, prompt in zip(made[:, 8:].tolist(), PROMPTS, strict=True):
        wanted = guided(model, prompt, scale, 16)
        assert row == wanted + [PAD] * (len(row) - len(wanted))


def guided_twice(model, prompt: list[int], first: float, second: float, steps: int) -> list[int]:
    """The same by three whole forwards: the third sees the spans of the document and none of its words."""
    grammar, ids = SpanProcessor(model.config), list(prompt)
    ranges = [model.config.token_ranges[name] for name in SPAN]
    spans = {*range(3, 7), *(token for held in ranges for token in range(held.start, held.stop))}
    for _ in range(steps):
        logits = model(torch.tensor([ids])).logits[:, -1]
        last = max(place for place, token in enumerate(ids) if token in range(1, 7))
        if ids[last] == BEGIN_IMAGE and len(ids) - 1 - last < 4:
            plain = model(torch.tensor([[BOS, *ids[last:]]])).logits[:, -1]
            wordless = [token for token in ids if token in spans]
            middle = model(torch.tensor([[BOS, *wordless]])).logits[:, -1]
            logits = plain + second * (middle - plain) + first * (logits - middle)
        ids.append(int(grammar(torch.tensor([ids]), logits).argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_two_scales_guide_away_from_the_words_and_then_from_the_spans(use_cache):
    """Rows with a span before, rows without, and a row that opens one later."""
    model = build(DENSE)
    picture = [
        BEGIN_IMAGE,
        *range(model.config.token_ranges["image"].start, model.config.token_ranges["image"].start + 4),
    ]
    held = [
        [BOS, 9, *picture, END_IMAGE, 12, 13, BEGIN_IMAGE],
        [BOS, 8, 10, BEGIN_IMAGE],
        [BOS, *picture, END_IMAGE, 9],
    ]
    length = max(map(len, held))
    given = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in held]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in held]),
    }
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": use_cache}
    made = model.generate(**given, **options, guidance={"image": (3.0, 1.5)})
    for row, prompt in zip(made[:, length:].tolist(), held, strict=True):
        wanted = guided_twice(model, prompt, 3.0, 1.5, 12)
        assert row == wanted + [PAD] * (len(row) - len(wanted))
    once = model.generate(**given, **options, guidance={"image": 3.0})
    assert not torch.equal(made, once)
    assert torch.equal(made[1, : length + 4], once[1, : length + 4]), "without a span before there is nothing between"


def test_guidance_changes_what_is_drawn_and_one_number_holds_for_all_spans():
    model = build(DENSE)
    plain, by_name, everywhere = (
        model.generate(**batch(), max_new_tokens=16, do_sample=False, guidance=scale)
        for scale in (None, {"image": 3.0, "speech": 3.0}, 3.0)
    )
    assert torch.equal(by_name, everywhere)
    assert not torch.equal(plain[:3], by_name[:3])


def test_a_scale_of_one_is_no_guidance_to_the_bit():
    model = build(DENSE)
    keep = {**batch(), "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    wanted, found = model.generate(**keep), model.generate(**keep, guidance=1.0)
    assert torch.equal(wanted.sequences, found.sequences)
    assert all(torch.equal(one, other) for one, other in zip(wanted.scores, found.scores, strict=True))
    assert span_processors(model, {"guidance": {"image": 1}})[0].__class__ is SpanProcessor


def test_a_span_that_is_all_there_is_needs_no_guidance():
    """Then both forwards see the same, so the scale changes nothing but rounding."""
    model = build(DENSE)
    prompt = torch.tensor([[BOS, BEGIN_IMAGE]])
    scores = torch.randn(1, DENSE.vocab_size)
    with torch.no_grad():
        logits = model(prompt).logits[:, -1]
    guide = GuidanceProcessor(model, 5.0)
    torch.testing.assert_close(guide(prompt, logits.clone()), logits)
    assert not torch.allclose(GuidanceProcessor(model, 5.0)(prompt, scores.clone()), scores)
    outside = torch.tensor([[BOS, 9]])
    assert torch.equal(guide(outside, scores.clone()), scores)


def test_keys_are_kept_from_step_to_step_and_made_anew_for_other_rows():
    model, lengths = build(DENSE), []
    forward = model.forward
    model.forward = lambda ids, **given: lengths.append(tuple(ids.shape)) or forward(ids, **given)
    guide = GuidanceProcessor(model, 2.0)
    scores = torch.zeros(2, DENSE.vocab_size)
    for ids in (
        [[BOS, 9, BEGIN_IMAGE], [BOS, 8, BEGIN_IMAGE]],
        [[BOS, 9, BEGIN_IMAGE, 20], [BOS, 8, BEGIN_IMAGE, 21]],
        [[BOS, 9, BEGIN_IMAGE, 20, 22], [BOS, 8, BEGIN_IMAGE, 21, 23]],
        [[BOS, 8, BEGIN_IMAGE, 21, 23, 24], [BOS, 9, BEGIN_IMAGE, 20, 22, 25]],  # rows changed places, as beams do
    ):
        guide(torch.tensor(ids), scores)
    assert lengths == [(2, 2), (2, 1), (2, 1), (2, 5)]


@pytest.mark.parametrize("name", ["dense", "mot", "moe"])
def test_one_picture_is_guided_as_transformers_guides_it(name):
    """Its own processor takes the lone span as a prompt of its own, and guides what follows the picture too."""
    model = build(DECLARATIONS[name])
    prompt, keep = torch.tensor([[BOS, 9, 11, 12, BEGIN_IMAGE]]), {"max_new_tokens": 4, "do_sample": False}
    lone = torch.tensor([[BOS, BEGIN_IMAGE]])
    found = model.generate(prompt, guidance={"image": 3.0}, **keep)
    assert torch.equal(found, model.generate(prompt, guidance_scale=3.0, negative_prompt_ids=lone, **keep))
    assert not torch.equal(found, model.generate(prompt, **keep))


def test_beams_and_samples_are_guided():
    model = build(DENSE)
    for way in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}):
        assert model.generate(**batch(), max_new_tokens=6, guidance=2.0, **way).shape[1] == 14


@pytest.mark.parametrize(
    ("config", "scale", "message"),
    [
        (DENSE, {"text": 2.0}, "guidance names 'text'; the modalities with boundary tokens are image, speech"),
        (DENSE, -1.0, "guidance must be 0 or more and finite, got -1.0"),
        (DENSE, float("inf"), "guidance must be 0 or more and finite, got inf"),
        (DENSE, float("nan"), "guidance must be 0 or more and finite, got nan"),
        (DENSE, {"image": (3.0, 1.0, 2.0)}, "give one number, or two"),
        (DENSE.replace(modalities=(TEXT,)), 2.0, "have no boundary tokens to guide within"),
        (with_towers(DENSE, "modality", keys=("und", "gen")), 2.0, "picked by the keys"),
    ],
)
def test_what_cannot_be_guided_is_refused(config, scale, message):
    with pytest.raises(SpanError, match=message):
        GuidanceProcessor(build(config), scale)
