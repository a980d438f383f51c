"""A whole Chameleon folder at a tiny size, from words and pictures to words and pictures."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from omnimoe import CheckpointError, convert_checkpoint, from_pretrained
from omnimoe.commands import generate as command
from omnimoe.generate import generate
from omnimoe.pipelines import find_pipeline
from omnimoe.pipelines.chameleon import GUIDANCE, Chameleon
from omnimoe.tokenizers.raster import to_middle, to_signed
from omnimoe.zoo.chameleon.decoder import FILE
from tests.hub.conftest import hub  # noqa: F401 - a fixture
from tests.zoo.chameleon.tiny import CELLS, FIRST_CODE, SIDE, decoder_tensors, publish, published_model

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))
BOS, EOS, END, BEGIN, TURN = 0, 2, 36, 37, 38


@pytest.fixture(scope="module")
def theirs():
    return published_model("7b", is_mixed=True)


@pytest.fixture(scope="module")
def bare(theirs, tmp_path_factory):
    """As published: without a decoder."""
    return publish(theirs, tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The same with one."""
    made = publish(theirs, tmp_path_factory.mktemp("whole"))
    save_file({**load_file(made / "model.safetensors"), **decoder_tensors()}, made / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def chameleon(folder):
    return Chameleon.from_pretrained(folder)


def codes(chameleon, picture) -> list[int]:
    pixels = to_signed(to_middle(picture, SIDE)[None])
    return (chameleon.model.model.modalities["image"].encode(pixels)[0] + FIRST_CODE).tolist()


def words(chameleon, text: str) -> list[int]:
    return chameleon.tokenizer.encode(text).tolist()


def test_what_a_document_lays_out(chameleon, theirs):
    """As transformers' processor does: begin, words, a picture between its two tokens, words, the end of the turn."""
    document = ["see ", PICTURES[0], "what is it?"]
    (prompt,) = chameleon._prompts([document], is_turn=True, room=1)
    shown = [BEGIN, *codes(chameleon, PICTURES[0]), END]
    assert prompt.ids.tolist() == [BOS, *words(chameleon, "see "), *shown, *words(chameleon, "what is it?"), TURN]
    pixels = to_signed(to_middle(PICTURES[0], SIDE)[None])
    assert theirs.get_image_tokens(pixels)[0].tolist() == shown[1:-1]
    (plain,) = chameleon._prompts(["a"], is_turn=False, room=1)
    assert plain.ids.tolist() == [BOS, *words(chameleon, "a")]


def test_answers_are_those_of_transformers(chameleon, theirs):
    """Greedy, where neither writes special words: theirs are suppressed, here they are outside of the grammar."""
    held = [["look: ", PICTURES[0], PICTURES[1], "?"], "say something"]
    found = chameleon.answer(held, max_new_tokens=6)
    for document, text in zip(held, found, strict=True):
        (prompt,) = chameleon._prompts([document], is_turn=True, room=1)
        specials = [row for row in range(40) if row != EOS]
        wanted = theirs.generate(
            prompt.ids[None], max_new_tokens=6, do_sample=False, suppress_tokens=specials, eos_token_id=EOS
        )[0, len(prompt.ids) :]
        assert text == chameleon.tokenizer.decode(wanted[wanted != EOS])
        assert chameleon.answer([document], max_new_tokens=6) == [text]


def test_a_picture_is_the_guided_walk(chameleon, theirs):
    """Code by code by three whole forwards of transformers' model: all, without the words, and nothing."""
    held = [["like ", PICTURES[0], "but red"], ["a red apple"]]
    found = chameleon.draw(held, temperature=0, seed=0)
    image = chameleon.model.config.token_ranges["image"]
    for document, picture in zip(held, found, strict=True):
        (prompt,) = chameleon._prompts([document], is_turn=True, room=CELLS, opened="image")
        ids, drawn = prompt.ids.tolist(), []
        assert ids[-1] == BEGIN
        shown = [token for token in ids[:-1] if token in (BEGIN, END) or image.start <= token < image.stop]
        for _ in range(CELLS):
            contexts = [[*ids, *drawn], [BOS, *shown, BEGIN, *drawn], [BOS, BEGIN, *drawn]]
            with torch.no_grad():
                hidden = [theirs.model(torch.tensor([context])).last_hidden_state for context in contexts]
                full, wordless, alone = (theirs.lm_head(held[0, -1]) for held in hidden)
            logits = alone + GUIDANCE[1] * (wordless - alone) + GUIDANCE[0] * (full - wordless)
            drawn.append(image.start + int(logits[image.start : image.stop].argmax()))
        wanted = chameleon.pictures.decode(torch.tensor(drawn) - image.start)
        assert picture.shape == (SIDE, SIDE, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, wanted)


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(chameleon):
    together = chameleon.draw(["a", "bb"], seed=7)
    (alone,) = chameleon.draw(["bb"], seed=8)
    assert np.array_equal(together[1], alone)
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(chameleon.draw(["bb"], seed=9)[0], alone)
    plain = chameleon.draw(["bb"], seed=8, guidance=1)
    assert np.array_equal(plain[0], chameleon.draw(["bb"], seed=8, guidance=(1.0, 1.0))[0])
    assert np.array_equal(
        chameleon.draw(["bb"], seed=8, guidance=2)[0], chameleon.draw(["bb"], seed=8, guidance={"image": 2})[0]
    )


def test_words_and_pictures_in_one_document(chameleon):
    """The begin of a picture is made likely; then spans follow each other, whole ones alone, and the end is kept."""
    chameleon = Chameleon(copy.deepcopy(chameleon.model), chameleon.tokenizer)
    with torch.no_grad():
        chameleon.model.lm_head.weight[BEGIN] *= 6
    found = chameleon.interleave(["a", "bb"], seed=1, max_new_tokens=60, temperature=1.3, top_p=None)
    assert len(found) == 2
    spans = [span for document in found for span in document]
    assert {span.modality for span in spans} == {"text", "image"}
    for span in spans:
        if span.modality == "image":
            assert len(span) == CELLS
            assert np.array_equal(span.raw, chameleon.pictures.decode(span.ids))
        else:
            assert isinstance(span.raw, str)
    again = [span.raw for span in found[0]]
    assert chameleon.answer([again], max_new_tokens=1), "what came out goes in again"


def test_special_words_are_never_written(chameleon):
    config = chameleon.model.config
    assert set(chameleon._silent) == {BOS, 1, 3, TURN, 39}
    texts = chameleon.answer(["a"] * 4, max_new_tokens=40, do_sample=True, temperature=3.0)
    assert all(isinstance(text, str) for text in texts)
    assert config.modality_of_ids()[chameleon._silent].eq(0).all()


def test_the_generic_generation_takes_its_tokenizers(chameleon):
    made = generate(
        chameleon.model, {"text": "a", "image": PICTURES[0]}, to="image", tokenizers=chameleon.tokenizers, seed=0
    )
    assert made[0].raw.shape == (SIDE, SIDE, 3)
    text = {"text": chameleon.tokenizer}
    again = generate(chameleon.model, {"text": "a", "image": PICTURES[0]}, to="image", tokenizers=text, seed=0)
    assert torch.equal(again[0].ids, made[0].ids), "the pictures' is a part of the model"
    options = {"to": "image", "tokenizers": text, "seed": 0}
    twice = generate(
        chameleon.model, [("image", PICTURES[0]), ("text", "a")], guidance={"image": (3.0, 1.2)}, **options
    )
    once = generate(chameleon.model, [("image", PICTURES[0]), ("text", "a")], guidance=3.0, **options)
    assert not torch.equal(twice[0].ids, once[0].ids)


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    """Meta's own names: the whole autoencoder."""
    own = {name: tensor.contiguous() for name, tensor in theirs.model.vqmodel.state_dict().items()}
    decoder = {name.removeprefix("model.vqmodel."): tensor for name, tensor in decoder_tensors().items()}
    path = tmp_path_factory.mktemp("vqgan") / "own.safetensors"
    save_file({**own, **decoder}, path)
    return path


class TestDecoder:
    """A checkpoint that was published without one, and the file that has it."""

    def test_it_answers_and_does_not_draw(self, bare):
        reads = Chameleon.from_pretrained(bare)
        assert reads.answer(["hello"], max_new_tokens=2)
        for call in (reads.draw, reads.interleave):
            with pytest.raises(ValueError, match=r"published without the decoder.*pass decoder=FILE"):
                call(["a"])

    def test_with_the_file_it_draws(self, bare, file, chameleon, tmp_path):
        wanted = chameleon.draw(["a"], seed=3)[0]
        given = Chameleon.from_pretrained(bare, decoder=file)
        assert np.array_equal(given.draw(["a"], seed=3)[0], wanted)
        copy = shutil.copytree(bare, tmp_path / "copy")
        shutil.copyfile(file, copy / FILE)
        assert np.array_equal(Chameleon.from_pretrained(copy).draw(["a"], seed=3)[0], wanted)
        convert_checkpoint(copy, tmp_path / "ours")
        assert np.array_equal(Chameleon.from_pretrained(tmp_path / "ours").draw(["a"], seed=3)[0], wanted)

    def test_the_model_is_saved_and_published_with_it(self, bare, file, folder, tmp_path):
        model = Chameleon.from_pretrained(bare, decoder=file).model
        model.save_pretrained(tmp_path / "ours")
        again = from_pretrained(tmp_path / "ours")
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
        convert_checkpoint(again, tmp_path / "back", to="published")
        held, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
        assert held.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in held.items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda held: {name: part for name, part in held.items() if "decoder" not in name},
                "holds no tensor whose",
            ),
            (lambda held: {**held, "quantize.embedding.weight": torch.zeros(32, 8)}, "is of another autoencoder"),
            (
                lambda held: {**held, "decoder.conv_in.bias": torch.zeros(3)},
                r"decoder\.conv_in\.bias is \(3,\) in the file",
            ),
            (
                lambda held: {name: part for name, part in held.items() if name != "decoder.conv_in.bias"},
                r"decoder\.conv_in\.bias is missing in the file and \(64,\) in the model",
            ),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(self, bare, file, tmp_path, change, message):
        save_file(change(load_file(file)), tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match=message):
            Chameleon.from_pretrained(bare, decoder=tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match="does not exist"):
            Chameleon.from_pretrained(bare, decoder=tmp_path / "none.safetensors")


def test_by_the_name_of_the_zoo_from_the_hub(hub, bare, chameleon, file, tmp_path):  # noqa: F811
    """The real client against a server of our own: first as Meta has it, then with the decoder beside it."""
    hub.add("facebook/chameleon-7b", bare)
    assert find_pipeline("chameleon_7b") == (Chameleon, "hf-hub:facebook/chameleon-7b")
    found = Chameleon.from_pretrained("chameleon_7b")
    assert found.answer(["a"], max_new_tokens=4) == chameleon.answer(["a"], max_new_tokens=4)
    whole = shutil.copytree(bare, tmp_path / "whole")
    shutil.copyfile(file, whole / FILE)
    hub.add("facebook/chameleon-30b", whole)
    drawn = Chameleon.from_pretrained("chameleon_34b").draw(["a"], seed=0)
    assert np.array_equal(drawn[0], chameleon.draw(["a"], seed=0)[0])


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[]], {}, "document 0 is empty"),
        ("a red apple", {}, "must be a list of documents, got one str"),
        ([PICTURES[0]], {}, "a document is words, or a list"),
        ([3], {}, "document 0 is of type int; a document is words, or a list"),
        (["a", None], {}, "document 1 is of type NoneType; a document is words, or a list"),
        (["a"], {"steps": 3}, "has no steps of denoising, got steps=3"),
        (["a"], {"sizes": (8, 16)}, r"pictures of 8 x 8 pixels and no others, got \(8, 16\)"),
        (["a"], {"temperature": -1}, "temperature must be 0 or more"),
        (["a"], {"guidance": (1.0, 2.0, 3.0)}, "guidance must be a number"),
        (["a"], {"guidance": "4"}, "guidance must be a number"),
        (["a"], {"seed": "0"}, "seed must be a whole number, got '0'"),
        (["a" * 240], {}, "document 0 has 243 tokens, and with 16 more it passes the 256"),
    ],
)
def test_what_cannot_be_asked_is_refused(chameleon, documents, options, message):
    with pytest.raises(ValueError, match=message):
        chameleon.draw(documents, **options)


def test_a_continuation_of_nothing_is_refused(chameleon):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        chameleon.interleave(["a"], max_new_tokens=0)


class TestCommand:
    """``omnimoe generate`` with a published checkpoint."""

    def call(self, folder, *arguments) -> None:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args(["--model", str(folder), *map(str, arguments)])) == 0

    def test_it_is_found(self, folder):
        assert find_pipeline(folder) == (Chameleon, str(folder))

    def test_words_to_pictures(self, folder, tmp_path, capsys):
        out = tmp_path / "apple.png"
        self.call(folder, "--from", "text", "an apple", "--to", "image", "--out", out, "--seed", 0, "--num", 2)
        made = [np.asarray(Image.open(tmp_path / f"apple_{number}.png")) for number in (1, 2)]
        assert made[0].shape == (SIDE, SIDE, 3)
        assert not np.array_equal(*made)
        assert "wrote" in capsys.readouterr().out

    def test_a_picture_and_words_to_words(self, folder, capsys):
        given = ("--from", "image", PICTURES[0], "--from", "text", "what is it?")
        self.call(folder, *given, "--to", "text", "--max-new-tokens", 3, "--json")
        told = json.loads(capsys.readouterr().out)
        assert told["samples"][0]["modality"] == "text"
        self.call(folder, *given, "--to", "text", "--max-new-tokens", 3, "--temperature", 0.8, "--seed", 1)

    def test_words_to_both(self, folder, tmp_path, capsys):
        out = tmp_path / "made"
        self.call(
            folder,
            "--from",
            "text",
            "a",
            "--to",
            "any",
            "--out",
            out,
            "--max-new-tokens",
            40,
            "--temperature",
            1,
            "--seed",
            0,
        )
        assert (out / "index.html").is_file()
        assert "all in order in" in capsys.readouterr().out
