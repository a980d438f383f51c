"""Generation in every direction, with the real vocabularies and a model of one narrow layer."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from omnimoe.data.documents import lay_out
from omnimoe.generate import GenerationError, generate, interleave, read_wave
from omnimoe.generation import prompts
from omnimoe.inputs import InputError
from omnimoe.layers import Attention, Rope
from omnimoe.modalities import Patches
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers import TokenizerError
from omnimoe.tokenizers.text import BEGIN_IMAGE_ID, BEGIN_SPEECH_ID, BOS_ID, END_IMAGE_ID, EOS_ID
from tests.declarations import DECLARATIONS, DENSE, build
from tests.generation.test_media import write_wave
from tests.narrow import CONFIG, NANO, PICTURE, RAW, SOUND, eager_model, narrow_model, narrow_tokenizers

# the module; `omnimoe.generate` is the function
generation = sys.modules["omnimoe.generate"]

RANGES = CONFIG.token_ranges


@pytest.fixture(scope="module")
def tokenizers():
    return narrow_tokenizers()


@pytest.fixture(scope="module")
def model():
    return narrow_model()


@pytest.mark.parametrize(
    ("source", "to"), [(source, to) for source in RAW for to in RAW if source != to] + [("text", "text")]
)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_every_direction(model, tokenizers, source, to, temperature):
    (made,) = generate(
        model, {source: RAW[source]}, to, tokenizers=tokenizers, seed=0, temperature=temperature, max_new_tokens=64
    )
    assert made.modality == to
    assert 1 <= len(made.ids) <= 64
    if to == "text":
        assert isinstance(made.raw, str)
    elif to == "image":
        assert len(made.ids) == 64
        assert made.raw.shape == (64, 64, 3)
        assert made.raw.dtype == np.uint8
    else:
        assert made.raw.shape == (640 * len(made.ids),)
        assert made.raw.dtype == np.float32
        assert made.sample_rate == 16_000
    decoded = tokenizers[to].decode(made.ids)
    assert decoded == made.raw if to == "text" else np.array_equal(decoded, made.raw)


@pytest.mark.parametrize(
    ("document", "to", "wanted"),
    [
        ({"text": "a red apple"}, "image", [BOS_ID, "text", BEGIN_IMAGE_ID]),
        ({"text": "a red apple"}, "speech", [BOS_ID, "text", BEGIN_SPEECH_ID]),
        ({"image": PICTURE}, "text", [BOS_ID, BEGIN_IMAGE_ID, "image", END_IMAGE_ID]),
        ([("image", PICTURE), ("text", "an")], "text", [BOS_ID, BEGIN_IMAGE_ID, "image", END_IMAGE_ID, "text"]),
        ([], "image", [BOS_ID, BEGIN_IMAGE_ID]),
    ],
)
def test_prompts_are_the_starts_of_documents(model, tokenizers, monkeypatch, document, to, wanted):
    seen = {}

    def record(ids, **options):
        seen["ids"] = ids
        return torch.cat((ids, torch.full((len(ids), 1), RANGES[to].start + 20)), 1)

    monkeypatch.setattr(model, "generate", record)
    monkeypatch.setattr(generation, "decoded", lambda name, ids, tokenizer: ids)
    generate(model, document, to, tokenizers=tokenizers)
    parts = dict(document)
    if "text" in parts and "image" in parts:
        parts["text"] = "an"
    expected = []
    for part in wanted:
        if isinstance(part, int):
            expected.append(part)
        else:
            expected += (tokenizers[part].encode(parts[part]) + RANGES[part].start).tolist()
    assert seen["ids"].tolist() == [expected]


def test_a_prompt_is_what_training_documents_start_with(tokenizers):
    text, image = tokenizers["text"].encode("a red apple").numpy(), tokenizers["image"].encode(PICTURE).numpy()
    whole = lay_out([("text", text), ("image", image)], RANGES, bos_id=BOS_ID, eos_id=EOS_ID).ids
    prompt = lay_out([("text", text)], RANGES, bos_id=BOS_ID, opened="image").ids
    assert whole[: len(prompt)].tolist() == prompt.tolist()
    assert whole[-1] == EOS_ID


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"seed": 3}, {"seed": 3, "guidance": 3.0, "top_k": 50}, {"seed": 3, "top_p": 0.8}],
    ids=str,
)
@pytest.mark.parametrize("to", ["image", "speech", "text"])
def test_a_batch_gives_what_each_document_gives_alone(model, tokenizers, to, options):
    """Sampled too, and however the batch is cut."""
    if to == "text":
        options = {name: value for name, value in options.items() if name != "guidance"}
    documents = [{"text": "a"}, [("text", "a very long red apple on a table"), ("speech", SOUND)], []]
    options = {**options, "tokenizers": tokenizers, "max_new_tokens": None if to == "image" else 20}
    together = generate(model, documents, to, **options)
    cut = generate(model, documents, to, batch_size=2, **options)
    for document, made, other in zip(documents, together, cut, strict=True):
        (alone,) = generate(model, document, to, **options)
        assert torch.equal(alone.ids, made.ids)
        assert torch.equal(other.ids, made.ids)


def test_the_first_of_more_samples_are_those_of_fewer(model, tokenizers):
    options = {"tokenizers": tokenizers, "seed": 1, "max_new_tokens": 12}
    few, more = (generate(model, {"text": "a"}, "speech", num_samples=count, **options) for count in (2, 4))
    assert [made.ids.tolist() for made in few] == [made.ids.tolist() for made in more[:2]]


def test_a_seed_for_each_document(model, tokenizers):
    options = {"tokenizers": tokenizers, "max_new_tokens": 12}
    one, other, same = generate(model, [{"text": "a"}] * 3, "speech", seed=[1, 2, 1], **options)
    assert torch.equal(one.ids, same.ids)
    assert not torch.equal(one.ids, other.ids)


def test_guidance_of_one_changes_nothing_and_of_three_does(model, tokenizers):
    options = {"tokenizers": tokenizers, "seed": 0}
    usual, one, by_name, three = (
        generate(model, {"text": "a red apple"}, "image", guidance=scale, **options)[0].ids
        for scale in (1.0, 1, {"speech": 3.0}, 3.0)
    )
    assert torch.equal(usual, one)
    assert torch.equal(usual, by_name)
    assert not torch.equal(usual, three)
    nothing = [generate(model, {}, "image", guidance=scale, **options)[0].ids for scale in (1.0, 3.0)]
    assert torch.equal(*nothing), "with nothing given there is nothing to guide towards"


def test_choices_by_modality(model, tokenizers):
    options = {"tokenizers": tokenizers, "seed": 0}
    greedy, mixed, sampled = (
        generate(model, {"text": "a"}, "image", temperature=given, **options)[0].ids
        for given in (0, {"image": 0, "text": 1.0}, {"text": 0})
    )
    assert torch.equal(greedy, mixed)
    assert not torch.equal(greedy, sampled)
    (narrow,) = generate(model, {"text": "a"}, "image", top_k={"image": 1}, **options)
    assert torch.equal(narrow.ids, greedy)
    (spans,) = interleave(
        eager_model(), {"text": "a"}, temperature={"image": 0}, guidance=2.0, max_new_tokens=160, **options
    )
    pictures = [span for span in spans if span.modality == "image"]
    assert pictures
    assert all(len(span) == 64 for span in pictures)


def test_a_model_with_positions_in_three_axes_generates(tokenizers):
    attention = CONFIG.attention.replace(rope=Rope.Config(sections=(4, 2, 2)))
    model, seen = narrow_model(CONFIG.replace(attention=attention)), []
    forward = model.model.forward
    model.model.forward = lambda **given: seen.append(given["position_ids"]) or forward(**given)
    (made,) = generate(model, {"image": PICTURE}, "image", tokenizers=tokenizers, seed=0)
    assert len(made.ids) == 64
    whole = torch.cat(seen, 1)[0]
    first, second = 2, 2 + 64 + 2
    assert whole[first + 63].tolist() == [first + 63, first + 7, first + 7]
    assert whole[second + 9].tolist() == [second + 9, second + 1, second + 1]


def test_samples_come_document_by_document(model, tokenizers):
    made = generate(
        model, [{"text": "a"}, {"text": "b"}], "text", tokenizers=tokenizers, seed=0, num_samples=3, max_new_tokens=8
    )
    assert len(made) == 6
    assert len({tuple(found.ids.tolist()) for found in made}) == 6


def test_a_seed_repeats_and_leaves_the_global_generator_alone(model, tokenizers):
    state = torch.get_rng_state()
    options = {"tokenizers": tokenizers, "max_new_tokens": 12, "num_samples": 2, "top_k": 500, "top_p": 0.99}
    runs = [generate(model, {"text": "a"}, "speech", seed=seed, **options) for seed in (5, 5, 6)]
    first, second, other = ([made.ids.tolist() for made in run] for run in runs)
    assert first == second
    assert first != other
    assert torch.equal(state, torch.get_rng_state())
    unseeded = [generate(model, {"text": "a"}, "speech", **options)[0].ids.tolist() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("to", ["image", "speech", "any"])
def test_with_the_tokenizers_that_ship_the_global_generator_is_left_alone_too(model, to):
    state = torch.get_rng_state()
    generate(model, {"text": "a"}, to, seed=5, max_new_tokens=64)
    assert torch.equal(state, torch.get_rng_state())


def test_text_ends_where_another_span_would_begin(model, tokenizers, monkeypatch):
    def scripted(ids, **options):
        assert {EOS_ID, BEGIN_IMAGE_ID, BEGIN_SPEECH_ID} == set(options["eos_token_id"])
        return torch.cat((ids, torch.tensor([[50, 60, BEGIN_IMAGE_ID, 2050]])), 1)

    monkeypatch.setattr(model, "generate", scripted)
    (made,) = generate(model, {"image": PICTURE}, "text", tokenizers=tokenizers)
    assert made.ids.tolist() == [50, 60]


def test_interleaved_continuations(model, tokenizers):
    continued = interleave(
        model, [{"text": "a"}, {"image": PICTURE}], tokenizers=tokenizers, seed=1, max_new_tokens=150, num_samples=2
    )
    assert len(continued) == 4
    for spans in continued:
        assert all(len(made.ids) == 64 for made in spans if made.modality == "image")
    only = interleave(model, {"text": "a"}, tokenizers=tokenizers, spans=(), seed=1, max_new_tokens=30)
    assert {made.modality for made in only[0]} <= {"text"}


@pytest.mark.parametrize("name", ["moma", "expert_choice", "one_way", "moe", "static"])
def test_every_kind_of_model_generates(name, tokenizers):
    config = DECLARATIONS[name].replace(modalities=CONFIG.modalities)
    (made,) = generate(build(config), {"text": "a"}, "image", tokenizers=tokenizers, seed=0)
    assert len(made.ids) == 64


@pytest.mark.parametrize(
    ("document", "to", "options", "message"),
    [
        ({"text": "a"}, "video", {}, "no modality 'video'; it has text, image, speech"),
        ({"video": "a"}, "image", {}, "no modality 'video'"),
        ({"text": ""}, "image", {}, "the text input '' is empty; leave it out"),
        ({"image": "nowhere.png"}, "text", {}, "no picture at nowhere.png"),
        ({"image": 3}, "text", {}, "a picture is a path"),
        ({"speech": np.zeros(0, np.float32)}, "text", {}, "at least one sample"),
        (["text"], "image", {}, "a document is a list of"),
        ({"text": "a"}, "image", {"max_new_tokens": 10}, "64 tokens, so max_new_tokens cannot be 10"),
        ({"text": "a"}, "text", {"max_new_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
        *(
            ({"text": "a"}, "image", {option: value}, f"{option} must be .*, got {value}")
            for option in ("temperature", "top_k", "top_p", "min_p", "guidance", "num_samples", "best_of", "batch_size")
            for value in (float("inf"), float("nan"))
        ),
        (
            {"text": "a"},
            "image",
            {"guidance": {"image": float("inf")}},
            "guidance must be .* finite, got inf",
        ),
        ({"text": "a"}, "text", {"max_new_tokens": float("inf")}, "max_new_tokens must be a whole number, got inf"),
        ({"text": "a"}, "image", {"temperature": -1}, "temperature must be 0 or more"),
        ({"text": "a"}, "image", {"temperature": 0, "num_samples": 2}, "one answer, not 2"),
        ({"text": "a"}, "image", {"num_samples": 0}, "num_samples"),
        ({"text": "a"}, "image", {"top_k": 0}, "top_k must be at least 1 and whole, got 0"),
        ({"text": "a"}, "image", {"top_p": 1.5}, "top_p must be in"),
        ({"text": "a"}, "image", {"min_p": -1}, "min_p must be in"),
        (
            {"text": "a"},
            "image",
            {"temperature": "hot"},
            "temperature must be a number or numbers by modality, got 'hot'",
        ),
        ({"text": "a"}, "image", {"guidance": -1}, "guidance must be 0 or more and finite, got -1"),
        ({"text": "a"}, "text", {"guidance": 2}, "text has no boundary tokens"),
        ({"text": "a"}, "image", {"temperature": {"video": 1}}, "temperature names 'video'; the modalities are text"),
        ({"text": "a"}, "image", {"temperature": {"image": 0}, "num_samples": 2}, "one answer, not 2"),
        ({"text": "a"}, "image", {"batch_size": 0}, "batch_size must be at least 1"),
        ({"text": "a"}, "image", {"best_of": 2, "num_samples": 3}, "best_of must be at least num_samples, 3, got 2"),
        ({}, "image", {"best_of": 2}, "needs inputs of discrete modalities"),
        ({"text": "a"}, "image", {"seed": -1}, "seed must be 0 or more"),
        ({"text": "a"}, "image", {"seed": [1, 2]}, "one for each of 1 documents"),
        ({"text": "a"}, "image", {"on_text": print}, "text is streamed for one output of text"),
        ({"text": "a"}, "text", {"on_text": print, "num_samples": 2}, "text is streamed for one output of text"),
    ],
)
def test_what_does_not_fit_is_refused(model, tokenizers, document, to, options, message):
    with pytest.raises((GenerationError, TokenizerError), match=message):
        generate(model, document, to, tokenizers=tokenizers, **options)


@pytest.mark.parametrize(
    ("config", "to", "message"),
    [
        (DENSE, "image", "has 1000 ids, spans of 64 tokens and frames of 1, the model 12, 4 and 1"),
        (CONFIG.replace(mask="bidirectional"), "image", "only causal models"),
        (CONFIG.replace(mask="block_causal", bidirectional_modalities=("image",)), "image", "both directions"),
        (DECLARATIONS["transfusion"], "latent", "cannot be laid out without num_tokens"),
        (
            CONFIG.replace(attention=Attention.Config(num_heads=2, rope=Rope.Config(sections=(4, 4)))),
            "text",
            "2 axes",
        ),
    ],
)
def test_models_that_cannot_are_told(config, to, message, tokenizers):
    with pytest.raises(GenerationError, match=message):
        generate(OmniMoeForCausalLM(config), [], to, tokenizers=tokenizers)


def test_a_sound_of_another_rate_is_resampled(model, tokenizers, tmp_path, monkeypatch):
    path = write_wave(tmp_path / "a.wav", SOUND, 8_000)
    lengths = []
    encode = tokenizers["speech"].encode
    monkeypatch.setattr(tokenizers["speech"], "encode", lambda *raw: lengths.append(len(encode(*raw))) or encode(*raw))
    generate(model, {"speech": read_wave(path)}, "text", tokenizers=tokenizers, max_new_tokens=2)
    assert lengths == [25]  # a second at 8 kHz, in units of 40 ms


def test_the_form_of_a_modality_picks_its_tokenizer():
    text, image, speech = NANO.modalities
    names = {}
    for form in (image, image.replace(num_tokens=256), Patches.Config(name="image", channels=16, num_tokens=64)):
        config = NANO.replace(modalities=(text, form, speech))
        names[form.num_tokens, form.is_discrete] = prompts.shipped_tokenizer(config, "image")
    assert names == {(64, True): "picture", (256, True): "picture_128", (64, False): "picture_latents"}
    assert prompts.shipped_tokenizer(NANO, "speech") == "speech"


def test_what_ships_fits_the_zoo():
    found = prompts.load_tokenizers(NANO, None, {"text", "image", "speech"})
    assert {name: tokenizer.num_tokens for name, tokenizer in found.items()} == {
        "text": None,
        "image": 64,
        "speech": None,
    }


def test_a_prompt_longer_than_the_model_was_made_for_is_refused(model, tokenizers):
    long = {"text": "apple " * 600}
    message = r"the prompt has \d{3,} tokens, and the model was made for 512; shorten the input"
    with pytest.raises(GenerationError, match=message):
        generate(model, long, "image", tokenizers=tokenizers)
    with pytest.raises(GenerationError, match=message):
        interleave(model, long, tokenizers=tokenizers)


def test_the_model_s_own_method_is_the_same():
    model = eager_model()
    options = {"tokenizers": narrow_tokenizers(), "seed": 3, "num_samples": 2}
    wanted = generate(model, {"text": "a lion"}, "image", **options)
    found = model.generate({"text": "a lion"}, to="image", **options)
    assert all(np.array_equal(one.raw, other.raw) for one, other in zip(found, wanted, strict=True))
    with pytest.raises(GenerationError, match="img"):
        model.generate({"text": "a lion"}, to="img", **options)


def test_any_lets_the_model_choose(model, tokenizers):
    options = {"tokenizers": tokenizers, "seed": 1, "max_new_tokens": 100, "num_samples": 2}
    wanted = interleave(model, {"text": "a"}, **options)
    for found in (generate(model, {"text": "a"}, "any", **options), model.generate({"text": "a"}, to="any", **options)):
        assert [[made.ids.tolist() for made in spans] for spans in found] == [
            [made.ids.tolist() for made in spans] for spans in wanted
        ]
    with pytest.raises(GenerationError, match="best_of is for one modality, not for to='any'; leave it out"):
        generate(model, {"text": "a"}, "any", best_of=2, **options)


@pytest.mark.parametrize("document", [{"text": "a"}, [("text", "a")], [{"text": "a"}], "a"])
def test_a_document_without_a_target_is_refused(model, document):
    with pytest.raises(InputError, match="without to= .* takes ids .* to= one of 'text', 'image', 'speech', 'any'"):
        model.generate(document)
    assert model.generate(torch.tensor([[BOS_ID]]), max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("to", ["text", "image", "any"])
def test_steps_are_refused_where_nothing_is_denoised(model, tokenizers, to):
    with pytest.raises(GenerationError, match=f"steps is for what is denoised; the model makes {to} token by token"):
        model.generate({"text": "a"}, to=to, tokenizers=tokenizers, steps=5)
