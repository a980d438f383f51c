"""A whole BAGEL folder at a tiny size, from words and pictures to words and pictures."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import omnimoe
from omnimoe import CheckpointError, convert_checkpoint
from omnimoe.commands import generate as command
from omnimoe.convert import to_published
from omnimoe.denoise import denoise
from omnimoe.guidance import Guidance
from omnimoe.pipelines import Pipeline, find_pipeline
from omnimoe.tokenizers import TokenizerError
from tests.tokenizers.test_hf_text import byte_level
from tests.zoo.bagel.documents import Latent, Seen, Text, batch
from tests.zoo.bagel.test_drawing import asked
from tests.zoo.bagel.test_parity import is_sight, partial
from tests.zoo.bagel.test_parity import model as model  # a fixture

pytest.importorskip("diffusers", reason="pip install 'omnimoe[diffusers]'")

from omnimoe.pipelines.bagel import EDITING, Bagel, _documents
from omnimoe.zoo.bagel.autoencoder import FILE, BagelAutoencoder
from tests.zoo.bagel.test_autoencoder import published

PICTURE = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))[0]
FEW = {"steps": 2, "seed": 0, "sizes": (32, 48)}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """As published: two weight files, a config of each part, a tokenizer, and a config.json that is none."""
    made = tmp_path_factory.mktemp("published") / "bagel"
    to_published(model, made)
    torch.manual_seed(1)
    network = BagelAutoencoder({"block_out_channels": (32, 32, 32, 32)}).network
    save_file(published(network, 4), made / FILE)
    byte_level().save(str(made / "tokenizer.json"))
    (made / "config.json").write_text('{"name": "BAGEL",}')
    return made


@pytest.fixture(scope="module")
def bagel(folder):
    return Bagel.from_pretrained(folder)


def test_words_to_a_picture_is_the_layout_that_was_proved(bagel, model):
    (found,) = bagel.draw(["a red apple"], **FEW)
    assert found.shape == (32, 48, 3)
    assert found.dtype == np.uint8
    words = Text(bagel.tokenizer.encode("a red apple").tolist())
    noise = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    given = asked(model, [[words, Latent(noise.view(2, 3, 64), 1.0)]])
    guide = Guidance(scales=((("text",), 4.0),), interval=(0.4, 1.0), renorm="global")
    rows = denoise(model, "image", given.pop("input_ids"), steps=2, shift=3.0, guidance=guide, **given)
    (wanted,) = bagel.autoencoder.decode([rows.view(2, 3, 64)])
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


def test_a_picture_is_changed_at_its_own_size(bagel):
    tall = Image.open(PICTURE).convert("RGB").resize((300, 560))
    read = _documents([[tall]])[0]
    assert read[0].size == (512, 960), "the shorter side is brought to 512 pixels"
    (found,) = bagel.draw([[PICTURE, "make it blue"]], steps=1, seed=0, sizes=(32, 32))
    assert found.shape == (32, 32, 3)
    assert bagel._shape(read, None) == (60, 32)


def test_what_an_edit_lays_out(bagel):
    """The picture as latents, then as seen, then the words, then what is drawn."""
    read = _documents([[PICTURE, "blue"]])[0]
    made = bagel._batch([read], drawn=[(1, 1)])
    seen = bagel.model.model.modalities["vision"].get_encoder().patches(read[0])
    (cells,) = bagel.autoencoder.encode([np.asarray(read[0])])
    words = Text(bagel.tokenizer.encode("blue").tolist())
    wanted = batch(bagel.model, [[Latent(cells), Seen(seen), words, Latent(torch.zeros(1, 1, 64), 1.0)]])
    assert torch.equal(made.input_ids, wanted["input_ids"])
    assert torch.equal(made.features["image"][0], cells)
    assert torch.equal(made.features["vision"]["patches"], wanted["features"]["vision"]["patches"])


def test_a_document_is_drawn_in_a_call_of_several_as_alone(bagel):
    together = bagel.draw(["a", "b"], steps=1, seed=7, sizes=np.array([32, 32]))
    alone = bagel.draw(["b"], steps=1, seed=8, sizes=(32, 32))
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1


def test_documents_with_pictures_are_guided_as_edits(bagel):
    given = {"steps": 2, "seed": 0, "sizes": (32, 32)}
    (found,), (wanted,) = (bagel.draw([[PICTURE, "blue"]], **given, **more) for more in ({}, {"guidance": EDITING}))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"seed": "0"}, "seed must be a whole number, got '0'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"guidance": "4"}, "guidance must be a number, got '4'"),
    ],
)
def test_choices_out_of_range_are_named(bagel, options, said):
    with pytest.raises(ValueError, match=said):
        bagel.draw(["a"], **{"steps": 1, "sizes": (32, 32), **options})


def test_a_folder_without_a_tokenizer_says_what_is_missing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer.json"))
    (tmp_path / "mute" / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"has no merges\.txt, without which no words can be read"):
        Bagel.from_pretrained(tmp_path / "mute")


def test_a_folder_of_ours_and_back_keeps_the_autoencoder(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="published")
    assert (tmp_path / "back" / FILE).read_bytes() == (folder / FILE).read_bytes()
    assert Bagel.from_pretrained(tmp_path / "back").draw(["a"], steps=1, sizes=(16, 16))


def test_answers_of_a_batch_are_those_of_each_alone(bagel):
    held = [[PICTURE, "what is it?"], "say something"]
    together = bagel.answer(held, max_new_tokens=5)
    assert together == [bagel.answer([document], max_new_tokens=5)[0] for document in held]
    assert all(isinstance(text, str) for text in together)


def test_several_pictures_of_unequal_size_at_once(bagel):
    found = bagel.draw(["a", "b"], steps=1, seed=0, sizes=[(16, 32), (32, 16)])
    assert [picture.shape for picture in found] == [(16, 32, 3), (32, 16, 3)]


@pytest.mark.parametrize(
    ("documents", "sizes", "message"),
    [
        ([[]], None, "document 0 is empty"),
        ([], None, "there is no document"),
        ("a red apple", None, "must be a list of documents, got one str"),
        (np.zeros((32, 32, 3), np.uint8), None, "got one ndarray"),
        ([np.zeros((32, 32, 3), np.uint8), "blue"], None, "document 0 is of type ndarray; a document is words"),
        (["a"], 32, "for each of 1 documents, got 32"),
        (["a"], (20, 32), r"multiples of 16 up to 1024 pixels, got \(20, 32\)"),
        (["a", "b"], [(16, 16)], "one for each of 2 documents, got"),
    ],
)
def test_what_cannot_be_asked_is_refused(bagel, documents, sizes, message):
    with pytest.raises(ValueError, match=message):
        bagel.draw(documents, sizes=sizes, steps=1)


def test_a_copy_without_an_autoencoder_answers_and_does_not_draw(bagel, folder, tmp_path):
    answers = Bagel(bagel.model, bagel.tokenizer)
    assert answers.answer(["hello"], max_new_tokens=2)
    with pytest.raises(ValueError, match="has no autoencoder to draw with"):
        answers.draw(["a"])
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "copy")], check=True)
    (tmp_path / "copy" / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no ae\.safetensors"):
        Bagel.from_pretrained(tmp_path / "copy")


class TestFound:
    """By the name of the zoo, by a folder, and not at all."""

    def test_a_folder(self, folder):
        assert find_pipeline(folder) == (Bagel, str(folder))

    def test_a_model_of_ours_has_none(self, model, tmp_path):
        model.save_pretrained(tmp_path / "ours")
        assert find_pipeline(tmp_path / "ours") is None
        assert find_pipeline("omni_nano") is None

    def test_what_a_family_cannot_do_is_told(self):
        with pytest.raises(ValueError, match="Pipeline makes  and draws no pictures"):
            Pipeline().draw(["a"])


class TestCommand:
    """``omnimoe generate`` with a published checkpoint."""

    def call(self, folder, *arguments) -> None:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args(["--model", str(folder), *map(str, arguments)])) == 0

    def test_words_to_pictures(self, folder, tmp_path, capsys):
        out = tmp_path / "apple.png"
        options = ("--size", "32x48", "--steps", 1, "--seed", 0, "--num", 2)
        self.call(folder, "--from", "text", "a red apple", "--to", "image", "--out", out, *options)
        made = [np.asarray(Image.open(tmp_path / f"apple_{number}.png")) for number in (1, 2)]
        assert made[0].shape == (32, 48, 3)
        assert not np.array_equal(*made)
        assert "wrote" in capsys.readouterr().out

    def test_a_picture_and_words_to_a_picture_and_to_words(self, folder, tmp_path, capsys):
        given = ("--from", "image", PICTURE, "--from", "text", "what is it?")
        out = tmp_path / "edited.png"
        self.call(folder, *given, "--to", "image", "--out", out, "--size", "32x32", "--steps", 1, "--guidance", 2)
        assert Image.open(out).size == (32, 32)
        capsys.readouterr()
        self.call(folder, *given, "--to", "text", "--max-new-tokens", 3, "--json")
        told = json.loads(capsys.readouterr().out)
        assert told["samples"][0]["modality"] == "text"
        again = ("--from", "image,text", PICTURE, "what is it?")
        self.call(folder, *again, "--to", "text", "--max-new-tokens", 3, "--json")
        assert json.loads(capsys.readouterr().out) == told
        once = tmp_path / "once.png"
        self.call(folder, *again, "--to", "image", "--out", once, "--size", "32x32", "--steps", 1, "--seed", 3)
        self.call(folder, *given, "--to", "image", "--out", out, "--size", "32x32", "--steps", 1, "--seed", 3)
        assert once.read_bytes() == out.read_bytes()

    def test_pictures_are_seen_and_a_missing_one_is_refused(self, folder, monkeypatch, capsys):
        seen = []
        batch_of = Bagel._batch

        def spied(pipeline, documents, **options):
            made = batch_of(pipeline, documents, **options)
            seen.append(sorted(made.features))
            return made

        monkeypatch.setattr(Bagel, "_batch", spied)
        self.call(folder, "--from", "image", PICTURE, "--from", "text", "a", "--to", "text", "--max-new-tokens", 1)
        assert seen == [["vision"]]
        monkeypatch.setattr(Bagel, "from_pretrained", lambda *given, **options: pytest.fail("the model was loaded"))
        with pytest.raises(ValueError, match="no picture at"):
            self.call(folder, "--from", "image", "no.png", "--to", "text")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--to", "speech", "--out", "x.wav"), "makes text, image, not 'speech'"),
            (("--to", "image", "--out", "x.png", "--size", "large"), "--size is HEIGHTxWIDTH"),
            (("--to", "image", "--out", "x.png", "--best-of", "3"), "--best-of is for models of our own"),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, folder, arguments, message):
        with pytest.raises(ValueError, match=message):
            self.call(folder, "--from", "text", "a", *arguments)

    @pytest.mark.parametrize("name", ["foo", "vision", "text,foo"])
    def test_a_name_of_neither_words_nor_pictures_is_refused(self, folder, name):
        with pytest.raises(ValueError, match=r"takes text and image, not '(foo|vision)'; write --from text"):
            self.call(folder, "--from", name, *[PICTURE] * len(name.split(",")), "--to", "text")


def test_a_copy_without_a_vision_tower_draws_from_words_alone(folder, tmp_path):
    copy = partial(folder, tmp_path / "blind", is_sight)
    for name in (FILE, "tokenizer.json"):
        shutil.copy(folder / name, copy / name)
    blind = Bagel.from_pretrained(copy)
    assert blind.draw(["an apple"], **FEW)[0].shape == (32, 48, 3)
    assert len(blind.answer(["an apple"], max_new_tokens=1)) == 1
    for call in (blind.draw, blind.answer):
        with pytest.raises(
            ValueError, match="this copy has no vision tower to see a picture with; give it words alone"
        ):
            call(["words", [PICTURE, "what is it?"]])
    blind.model.save_pretrained(tmp_path / "ours")  # the mark stays with the model
    again = Bagel(omnimoe.from_pretrained(tmp_path / "ours"), blind.tokenizer, blind.autoencoder)
    with pytest.raises(ValueError, match="no vision tower"):
        again.answer([[PICTURE]])
