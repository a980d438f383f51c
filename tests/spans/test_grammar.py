"""The grammar: what may follow, that everything generated obeys it, and that sequences come apart again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeConfig
from omnimoe.spans import Span, SpanError, SpanProcessor, has_spans, read_spans
from tests.declarations import CAUSAL, DECLARATIONS, DENSE, IMAGE, PATCHES, SPEECH, TEXT, build

PAD, BOS, EOS, BEGIN_IMAGE, END_IMAGE, BEGIN_SPEECH, END_SPEECH = range(7)
IMAGES, UNITS = set(range(20, 32)), set(range(32, 40))
TEXTS = set(range(7, 20))
MAX_SPAN = 3


def following(ids: list[int], *, opened=("image", "speech"), max_span: int | None = None) -> set[int]:
    """What may follow, read token by token: the grammar a second time, as plainly as it can be said."""
    state, count = "text", 0
    for token in ids:
        if token == BEGIN_IMAGE:
            state, count = "image", 0
        elif token == BEGIN_SPEECH:
            state, count = "speech", 0
        elif token in (END_IMAGE, END_SPEECH, BOS, EOS):
            state = "text"
        else:
            count += 1
    if state == "image":
        return IMAGES if count < 4 else {END_IMAGE}
    if state == "speech":
        if max_span is not None and count >= max_span:
            return {END_SPEECH}
        return UNITS | ({END_SPEECH} if count else set())
    begins = {"image": BEGIN_IMAGE, "speech": BEGIN_SPEECH}
    return TEXTS | {EOS} | {begins[name] for name in opened}


def rows_of(mask: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


def complaints(row: list[int], prompt: int, **options) -> list[str]:
    """Where a generated row breaks the grammar; padding after the end is fine."""
    found = []
    for place in range(prompt, len(row)):
        if row[place - 1] == EOS or (row[place] == PAD and EOS in row[prompt:place]):
            continue
        if row[place] not in following(row[:place], **options):
            found.append(f"{row[place]} at {place} after {row[:place]}")
    return found


@st.composite
def documents(draw) -> list[int]:
    """The start of a well-formed document."""
    ids = [BOS]
    for kind in draw(st.lists(st.sampled_from(["text", "image", "speech"]), max_size=5)):
        if kind == "text":
            ids += draw(st.lists(st.sampled_from(sorted(TEXTS)), min_size=1, max_size=3))
        elif kind == "image":
            ids += [BEGIN_IMAGE, *draw(st.lists(st.sampled_from(sorted(IMAGES)), min_size=4, max_size=4)), END_IMAGE]
        else:
            ids += [BEGIN_SPEECH, *draw(st.lists(st.sampled_from(sorted(UNITS)), min_size=1, max_size=3)), END_SPEECH]
    return ids[: draw(st.integers(1, len(ids)))]


@given(st.lists(documents(), min_size=1, max_size=4), st.sampled_from([None, 2]), st.sampled_from([(), ("image",)]))
def test_what_may_follow_is_what_the_plain_reading_says(rows, max_span, opened):
    processor = SpanProcessor(DENSE, spans=opened, max_span=max_span)
    length = max(map(len, rows))
    batch = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    expected = [following(row, opened=opened, max_span=max_span) for row in rows]
    assert rows_of(processor.allowed(batch)) == expected
    scores = processor(batch, torch.zeros(len(rows), DENSE.vocab_size))
    assert rows_of(scores.isfinite()) == expected


def test_nothing_so_far_is_text():
    assert rows_of(SpanProcessor(DENSE).allowed(torch.zeros(1, 0, dtype=torch.int64))) == [following([])]


PROMPTS = {
    "text": [BOS, 9, 10],
    "picture": [BOS, BEGIN_IMAGE],
    "a picture half done": [BOS, 9, BEGIN_IMAGE, 20, 21],
    "after a picture": [BOS, BEGIN_IMAGE, 20, 21, 22, 23, END_IMAGE],
    "speech": [BOS, 9, BEGIN_SPEECH],
    "speech half done": [BOS, 9, 9, BEGIN_SPEECH, 33, 34],
    "picture to speech": [BOS, BEGIN_IMAGE, 20, 21, 22, 23, END_IMAGE, BEGIN_SPEECH],
    "speech to picture": [BOS, BEGIN_SPEECH, 33, END_SPEECH, BEGIN_IMAGE],
}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "few": {"do_sample": True, "top_k": 3, "top_p": 0.9, "temperature": 2.0},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "penalty": {"do_sample": True, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"max_span": MAX_SPAN}, {"spans": ("speech",), "max_span": {"speech": 2}}])
def test_every_generated_sequence_obeys(way, options):
    model = build(DECLARATIONS["mot"])
    length = max(map(len, PROMPTS.values()))
    batch = torch.tensor([[PAD] * (length - len(row)) + row for row in PROMPTS.values()])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in PROMPTS.values()])
    made = model.generate(batch, attention_mask=mask, max_new_tokens=20, **options, **WAYS[way])
    longest = options.get("max_span")
    longest = longest["speech"] if isinstance(longest, dict) else longest
    opened = options.get("spans", ("image", "speech"))
    samples = len(made) // len(batch)
    for row, ids in enumerate(made.tolist()):
        start = length - len(list(PROMPTS.values())[row // samples])
        assert complaints(ids[start:], length - start, opened=opened, max_span=longest) == []


@pytest.mark.parametrize("name", CAUSAL)
def test_every_kind_of_model_obeys(name):
    config = DECLARATIONS[name]
    if not has_spans(config):
        pytest.skip("one discrete modality")
    batch = torch.tensor([[BOS, 9, BEGIN_IMAGE], [BOS, 9, BEGIN_SPEECH]])
    made = build(config).generate(
        batch, max_new_tokens=16, do_sample=True, top_k=0, max_span=MAX_SPAN, use_cache=config.mask != "one_way"
    )
    assert [complaints(row, 3, max_span=MAX_SPAN) for row in made.tolist()] == [[], []]


def test_a_free_model_does_as_it_likes():
    model = build(DENSE)
    made = model.generate(torch.tensor([[BOS, BEGIN_IMAGE]] * 8), max_new_tokens=6, do_sample=True, top_k=0, free=True)
    assert any(complaints(row, 2) for row in made.tolist())


def test_a_misspelt_argument_is_still_refused():
    with pytest.raises(ValueError, match="max_spam"):
        build(DENSE).generate(torch.tensor([[BOS]]), max_new_tokens=2, max_spam=3)


@pytest.mark.parametrize(
    "config",
    [
        OmniMoeConfig(modalities=(TEXT,)),
        OmniMoeConfig(modalities=(TEXT, Tokens.Config(name="image", vocab_size=12))),
        DECLARATIONS["transfusion"],
    ],
    ids=["text", "no boundaries", "one discrete"],
)
def test_without_boundary_tokens_there_is_no_grammar(config):
    assert not has_spans(config)
    with pytest.raises(SpanError, match="no boundary tokens"):
        SpanProcessor(config)
    model, prompt = build(config), torch.tensor([[BOS, 9]])
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 5)
    with pytest.raises(SpanError, match="no boundary tokens"):
        model.generate(prompt, max_new_tokens=2, spans=["image"])


def test_ranges_that_cut_into_text_and_rows_of_nobody():
    """A published layout: picture codes inside the range of text, two rows at the end that nobody owns."""
    text = Tokens.Config(name="text", vocab_size=20)
    image = Tokens.Config(name="image", vocab_size=4, vocab_start=4, begin_id=2, end_id=3, num_tokens=2)
    config = OmniMoeConfig(modalities=(text, image), vocab_size=22, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    processor = SpanProcessor(config)
    assert rows_of(processor.allowed(torch.tensor([[0, 9]]))) == [{1, 2, *range(8, 20)}]
    assert rows_of(processor.allowed(torch.tensor([[0, 2]]))) == [{4, 5, 6, 7}]
    assert rows_of(processor.allowed(torch.tensor([[2, 4, 5]]))) == [{3}]


def test_a_continuous_span_may_be_opened_and_is_never_closed():
    latent = PATCHES.replace(begin_id=8, end_id=9)
    config = DENSE.replace(modalities=(TEXT, IMAGE, SPEECH, latent))
    usual = following([]) - {PATCHES.placeholder_id, 8, 9}
    assert rows_of(SpanProcessor(config).allowed(torch.tensor([[BOS]]))) == [usual | {8}]
    assert rows_of(SpanProcessor(config, spans=["image"]).allowed(torch.tensor([[BOS]]))) == [usual - {BEGIN_SPEECH}]


def test_temperature_and_top_k_by_modality():
    processor = SpanProcessor(DENSE, temperature={"image": 2.0, "text": 0.5}, top_k={"image": 3, "speech": 1})
    ids = torch.tensor([[BOS, 9, 9], [BOS, 9, BEGIN_IMAGE], [BOS, 9, BEGIN_SPEECH]])
    scores = torch.arange(40.0).expand(3, -1)
    text, image, speech = processor(ids, scores)
    assert text[19] == 38
    assert int(text.isfinite().sum()) == len(following([]))
    assert image.isfinite().nonzero().flatten().tolist() == [29, 30, 31]
    assert image[31] == 15.5
    assert speech.isfinite().nonzero().flatten().tolist() == [39]
    assert speech[39] == 39


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": ["video"]}, "image, speech can be opened"),
        ({"spans": ["text"]}, "spans names 'text'"),
        ({"max_span": 0}, "at least 1 and finite, got 0"),
        ({"max_span": float("inf")}, "at least 1 and finite, got inf"),
        ({"max_span": {"video": 3}}, "names 'video'"),
        ({"temperature": {"image": 0}}, "positive, got 0"),
        ({"top_k": {"image": 0}}, "at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(SpanError, match=message):
        SpanProcessor(DENSE, **options)


def plain(spans: list[Span]) -> list[tuple[str, list[int], bool]]:
    return [(span.modality, span.ids.tolist(), span.is_whole) for span in spans]


def test_a_sequence_comes_apart():
    ids = [PAD, BOS, 9, 10, BEGIN_IMAGE, 20, 21, 22, 23, END_IMAGE, BEGIN_SPEECH, 33, END_SPEECH, 11, EOS, 12]
    assert plain(read_spans(torch.tensor(ids), DENSE)) == [
        ("text", [9, 10], True),
        ("image", [0, 1, 2, 3], True),
        ("speech", [1], True),
        ("text", [11], True),
    ]


def test_what_was_cut_short_is_not_whole():
    assert plain(read_spans(torch.tensor([BOS, BEGIN_IMAGE, 20, 21]), DENSE)) == [("image", [0, 1], False)]
    assert plain(read_spans(torch.tensor([BOS, BEGIN_SPEECH, 33, EOS]), DENSE)) == [("speech", [1], False)]
    assert plain(read_spans(torch.tensor([BEGIN_IMAGE, 20, END_IMAGE]), DENSE)) == [("image", [0], False)]
    assert read_spans(torch.tensor([BOS, EOS]), DENSE) == []


def test_a_foreign_row_in_a_span_is_refused():
    with pytest.raises(SpanError, match="row 33 at 2 belongs to speech, inside a span of image"):
        read_spans(torch.tensor([BOS, BEGIN_IMAGE, 33]), DENSE)
