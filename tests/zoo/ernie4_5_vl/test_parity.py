"""ERNIE-4.5-VL beside transformers': tiny random copies, published to a folder and loaded from it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from omnimoe import convert_checkpoint, from_pretrained, quantize
from omnimoe.grids import grid_positions
from omnimoe.inputs import InputError
from tests.zoo.ernie4_5_vl.tiny import CLIP, DOCUMENTS, SEEN, batches, encoder, publish, reference
from tests.zoo.weights import close

LACKING = {
    "words alone": ((4,), (6,)),
    "pictures without clips": ((3, (1, 4, 6), 2), (2, (1, 2, 2), (1, 2, 4), 1)),
    "clips without pictures": ((2, (2, 4, 4), 3), (5,)),
    "nothing but a picture": (((1, 4, 4),),),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model, its folder, and the same folder as a model of ours."""
    theirs = reference()
    folder = publish(theirs, tmp_path_factory.mktemp("published"))
    return theirs, folder, from_pretrained(folder)


def real(given: dict, logits: Tensor) -> Tensor:
    return logits[given["attention_mask"].bool()]


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_interleaved_documents(pair, side):
    theirs, _, ours = pair
    mine, other = batches(ours, side=side)
    wanted = theirs(**other, output_hidden_states=True)
    found = ours(**mine, output_hidden_states=True)
    close(real(mine, found.logits), real(mine, wanted.logits))
    for one, two in zip(found.hidden_states, wanted.hidden_states, strict=True):
        close(real(mine, one), real(mine, two))


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("documents", LACKING.values(), ids=LACKING)
def test_a_modality_absent(pair, documents, side):
    theirs, _, ours = pair
    mine, other = batches(ours, documents, side)
    close(real(mine, ours(**mine).logits), real(mine, theirs(**other).logits))


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_in_time_row_and_column(pair, side):
    theirs, _, ours = pair
    mine, other = batches(ours, side=side)
    wanted, _ = theirs.model.get_rope_index(**{name: held for name, held in other.items() if "pixel" not in name})
    valid, kinds = mine["attention_mask"].bool(), ours.model.modality_ids_of(mine["input_ids"])
    found = grid_positions(ours.config, kinds, ours.model.shapes_of(mine["features"]), valid)
    assert torch.equal(found[valid], wanted.movedim(0, -1)[valid])
    packed = torch.cat([found[row][valid[row]] for row in range(len(valid))])
    flat = {name: torch.cat([held[row][valid[row]] for row in range(len(valid))])[None] for name, held in
            (("ids", mine["input_ids"]), ("segments", torch.arange(len(valid))[:, None].expand_as(valid)))}  # fmt: skip
    again = grid_positions(
        ours.config,
        ours.model.modality_ids_of(flat["ids"]),
        ours.model.shapes_of(mine["features"]),
        segment_ids=flat["segments"],
    )
    assert torch.equal(again[0], packed)


@torch.no_grad()
def test_a_prompt_in_pieces_and_then_steps(pair):
    """The pieces end inside a picture, between documents' parts, and one token at a time."""
    theirs, _, ours = pair
    mine, other = batches(ours, DOCUMENTS[:1])
    ids = mine["input_ids"]
    whole = theirs(**other).logits
    close(ours(**mine).logits, whole)
    positions = grid_positions(ours.config, ours.model.modality_ids_of(ids), ours.model.shapes_of(mine["features"]))
    first, steps = int((ids[0] >= SEEN).nonzero()[-1]) + 2, ids.shape[1]
    out = ours(ids[:, :first], position_ids=positions[:, :first], features=mine["features"], use_cache=True)
    close(out.logits, whole[:, :first])
    for at in range(first, steps):
        out = ours(ids[:, at : at + 1], position_ids=positions[:, at : at + 1], past_key_values=out.past_key_values)
        close(out.logits[:, 0], whole[:, at])
    # a piece of words before a piece with pictures
    out = ours(ids[:, :2], position_ids=positions[:, :2], use_cache=True)
    rest = ours(
        ids[:, 2:], position_ids=positions[:, 2:], features=mine["features"], past_key_values=out.past_key_values
    )
    close(rest.logits, whole[:, 2:])


@torch.no_grad()
@pytest.mark.parametrize("documents", [DOCUMENTS, LACKING["pictures without clips"]], ids=["mixed", "no clips"])
def test_cached_steps_of_a_padded_batch(pair, documents):
    theirs, _, ours = pair
    mine, other = batches(ours, tuple((*document, 4) for document in documents), "left")
    ids, mask = mine["input_ids"], mine["attention_mask"]
    whole = theirs(**other).logits
    kinds, shapes = ours.model.modality_ids_of(ids), ours.model.shapes_of(mine["features"])
    positions = grid_positions(ours.config, kinds, shapes, mask.bool())
    first = int((ids >= SEEN).nonzero()[:, 1].max()) + 2
    assert first + 2 < ids.shape[1]
    cache, given = None, {"features": mine["features"]}
    for start, stop in itertools.pairwise([0, first, *range(first + 1, ids.shape[1] + 1)]):
        out = ours(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        cache, given, kept = out.past_key_values, {}, mask[:, start:stop].bool()
        close(out.logits[kept], whole[:, start:stop][kept])


@pytest.mark.parametrize("documents", [DOCUMENTS, LACKING["words alone"]], ids=["mixed", "words"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generation_of_a_padded_batch(pair, documents, cache):
    theirs, _, ours = pair
    mine, other = batches(ours, documents, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    barred = [[token] for token in (SEEN, CLIP, 50, 53)]
    wanted = theirs.generate(**other, **options, bad_words_ids=barred)
    found = ours.generate(**mine, **options, **({"cache_implementation": cache} if cache else {}))
    assert torch.equal(found, wanted)


def test_beams_and_samples_take_pictures_along(pair):
    theirs, _, ours = pair
    mine, other = batches(ours, DOCUMENTS[2:3], "left")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 3}
    barred = [[token] for token in (SEEN, CLIP, 50, 53)]
    assert torch.equal(ours.generate(**mine, **options), theirs.generate(**other, **options, bad_words_ids=barred))
    held, _ = batches(ours, side="left")
    options |= {"num_return_sequences": 3}
    found = ours.generate(**held, **options).view(len(DOCUMENTS), 3, -1)
    for place, document in enumerate(DOCUMENTS):
        alone, _ = batches(ours, (document,), "left")
        if place:  # words are drawn by the place of a document
            alone["input_ids"] = held["input_ids"][place : place + 1, -alone["input_ids"].shape[1] :]
        one = ours.generate(**alone, **options)
        assert torch.equal(found[place, :, held["input_ids"].shape[1] :], one[:, alone["input_ids"].shape[1] :])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("documents", [DOCUMENTS, *LACKING.values()], ids=["mixed", *LACKING])
def test_gradients(pair, documents, side, tmp_path):
    """Their gradients, published as if they were weights, are ours."""
    theirs, _, ours = pair
    mine, other = batches(ours, documents, side)
    for model, given in ((ours, mine), (theirs, other)):
        model.zero_grad()
        logits = real(mine, model(**given).logits)
        mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * mix).mean().backward()
    twin = reference()
    with torch.no_grad():
        for held, parameter in zip(twin.parameters(), theirs.parameters(), strict=True):
            held.copy_(torch.zeros_like(held) if parameter.grad is None else parameter.grad)
    wanted = from_pretrained(publish(twin, tmp_path))
    largest = max(float(parameter.grad.norm()) for parameter in theirs.parameters() if parameter.grad is not None)
    for (name, parameter), (_, other_one) in zip(ours.named_parameters(), wanted.named_parameters(), strict=True):
        scale = float(other_one.detach().norm())
        if parameter.grad is None:
            assert "vision" in name, name
            assert scale == 0, name
            continue
        # a bias of keys shifts all scores of a query alike, so its gradient is rounding and nothing else
        assert float((parameter.grad - other_one.detach()).norm()) < 1e-5 * scale + 1e-7 * largest, name


def test_what_does_not_fit_is_refused(pair):
    _, _, ours = pair
    mine, _ = batches(ours, DOCUMENTS[:1])
    vision = mine["features"]["vision"]
    with pytest.raises(InputError, match=r"features\['vision'\] become 10 rows, and the sequence has 6 positions"):
        ours(mine["input_ids"][:, :12], features={"vision": vision})
    torn = mine["input_ids"].clone()
    torn[:, [4, 0]] = torn[:, [0, 4]]
    with pytest.raises(InputError, match="do not stand side by side"):
        ours(torn, features={"vision": vision})
    with pytest.raises(InputError, match="pass position_ids, as generate does"):
        ours(torch.tensor([[5]]), past_key_values=ours(torch.tensor([[4, 5]]), use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="must be multiples of 2"):
        ours(mine["input_ids"], features={"vision": {**vision, "grids": vision["grids"] + 1}})


def test_features_computed_once(pair):
    _, _, ours = pair
    mine, _ = batches(ours)
    with torch.no_grad():
        features = encoder(ours)(mine["features"]["vision"])
        assert torch.equal(ours(**{**mine, "features": {"vision": features}}).logits, ours(**mine).logits)
    ids = [span.tolist() for span in ours.model.modalities["vision"].span_ids(features)]
    assert ids[0] == [50, *[SEEN] * 6, 51]
    assert ids[1] == [53, *[CLIP] * 4, 54]


def test_words_alone_from_a_copy_without_the_experts_for_pictures(pair, tmp_path):
    theirs, folder, _ = pair
    convert_checkpoint(folder, tmp_path / "ours")
    words = from_pretrained(tmp_path / "ours", towers=["text"])
    assert words.config.modality_names == ("text",)
    assert words.num_parameters() < theirs.num_parameters() / 2
    mine, other = batches(words, LACKING["words alone"])
    with torch.no_grad():
        close(real(mine, words(**mine).logits), real(mine, theirs(**other).logits))


def test_a_quantised_copy_reads_words_and_pictures(pair):
    pytest.importorskip("torchao")
    _, folder, ours = pair
    small = quantize(from_pretrained(folder))
    for documents in (DOCUMENTS, LACKING["words alone"]):
        mine, _ = batches(small, documents)
        logits = small(**mine).logits.detach()
        close(real(mine, logits), real(mine, ours(**mine).logits.detach()), 0.1)
