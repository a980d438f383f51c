"""A whole ERNIE-4.5-VL folder at a tiny size, from words, pictures and clips to words."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

from omnimoe.commands import generate as command
from omnimoe.encoders import EncoderError
from omnimoe.pipelines import find_pipeline
from omnimoe.pipelines.ernie4_5_vl import ANSWER, BEGIN, THINK, THOUGHT, USER, Ernie45VL
from omnimoe.tokenizers import TokenizerError
from tests.zoo.ernie4_5_vl.tiny import publish, reference

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))
SPECIAL = ("<unk>", "<s>", "</s>", BEGIN, THINK, THOUGHT, "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>")
SPECIAL += ("<|VIDEO_START|>", "<|VIDEO_END|>", "<|VIDEO_PLACEHOLDER|>")
IDS = {name: SPECIAL.index(f"<|{word}|>") for name, word in {
    "image_start_token_id": "IMAGE_START", "image_end_token_id": "IMAGE_END", "image_token_id": "IMAGE_PLACEHOLDER",
    "video_start_token_id": "VIDEO_START", "video_end_token_id": "VIDEO_END", "video_token_id": "VIDEO_PLACEHOLDER",
}.items()}  # fmt: skip
SMALL = {"patch_size": 14, "hidden_size": 16, "intermediate_size": 16, "depth": 1}


def write_tokenizer(folder: Path) -> int:
    """Bytes behind the special words."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *letters))}
    held = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    held.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    held.decoder = tokenizers.decoders.ByteLevel()
    held.add_special_tokens(list(SPECIAL))
    held.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("ernie")
    size = write_tokenizer(made)
    publish(reference({"vocab_size": size + 4, "max_position_embeddings": 400}, SMALL, markers=IDS), made)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    return Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ernie(folder) -> Ernie45VL:
    return Ernie45VL.from_pretrained(folder)


def small(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB").resize((56, 84))


def words(ernie: Ernie45VL, text: str) -> list[int]:
    return ernie.tokenizer.encode(text).tolist()


def test_what_a_document_lays_out(ernie):
    """A turn of the published template: each picture under its number, no thoughts."""
    picture, clip = small(PICTURES[0]), np.zeros((3, 56, 56, 3), np.uint8)
    ids, seen = ernie._laid(["see ", picture, "and", clip, "why?"], thinking=False, is_turn=True)
    shown = [IDS["image_start_token_id"], *[IDS["image_token_id"]] * 6, IDS["image_end_token_id"]]
    moved = [IDS["video_start_token_id"], *[IDS["video_token_id"]] * 8, IDS["video_end_token_id"]]
    think, thought = SPECIAL.index(THINK), SPECIAL.index(THOUGHT)
    assert ids.tolist() == [
        SPECIAL.index(BEGIN),
        *words(ernie, f"{USER}see Picture 1:"),
        *shown,
        *words(ernie, "andVideo 1:"),
        *moved,
        *words(ernie, f"why?{ANSWER}"),
        *(think, *words(ernie, "\n\n"), thought, *words(ernie, "\n\n")),
    ]
    assert [grid for _, grid in seen] == [(1, 6, 4), (4, 4, 4)]
    wanted = Ernie4_5_VLMoeImageProcessorPil()([picture], return_tensors="pt")
    assert torch.equal(seen[0][0], wanted["pixel_values"])
    plain, _ = ernie._laid(["a"], thinking=False, is_turn=False)
    assert plain.tolist() == [SPECIAL.index(BEGIN), *words(ernie, "a")]
    thoughts, _ = ernie._laid(["a"], thinking=True, is_turn=True)
    assert thoughts[-1] == think


def test_what_somebody_writes_is_no_marker(ernie):
    ids, _ = ernie._laid(["<|IMAGE_START|></s>"], thinking=False, is_turn=False)
    assert ids.tolist()[1:] == words(ernie, "<|IMAGE_START|></s>")
    assert not set(ids.tolist()[1:]) & set(range(len(SPECIAL)))


def test_answers_are_those_of_transformers(ernie, theirs):
    """Greedy, each document alone there, all together here."""
    documents = [["look: ", small(PICTURES[0]), small(PICTURES[1]), "?"], ["say something"], [small(PICTURES[2]), "a"]]
    found = ernie.answer(documents, max_new_tokens=6)
    for document, text in zip(documents, found, strict=True):
        ids, seen = ernie._laid(document, thinking=False, is_turn=True)
        ids = ids[None]
        kinds = (ids == IDS["image_token_id"]).long()
        ends = kinds + torch.isin(ids, torch.tensor([IDS["image_start_token_id"], IDS["image_end_token_id"]]))
        given = {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": ends}
        if seen:
            given["pixel_values"] = torch.cat([patches for patches, _ in seen])
            given["image_grid_thw"] = torch.tensor([grid for _, grid in seen])
        begins = [IDS[name] for name in IDS if "end" not in name]
        rows = ernie.model.config.vocab_size
        barred = [*begins, *range(rows - 4, rows)]
        wanted = theirs.generate(
            ids, **given, max_new_tokens=6, do_sample=False, suppress_tokens=barred, eos_token_id=2, pad_token_id=0
        )[0, ids.shape[1] :]
        assert text == ernie.tokenizer.decode(wanted[wanted != 2])
        assert ernie.answer([document], max_new_tokens=6) == [text]


def test_the_command_answers_and_draws_nothing(folder, tmp_path, capsys):
    assert find_pipeline(folder) == (Ernie45VL, str(folder))
    path = tmp_path / "small.png"
    small(PICTURES[0]).save(path)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    asked = ["--model", str(folder), "--from", "image", str(path), "--from", "text", "what is it?", "--device", "cpu"]
    assert command.run(parser.parse_args([*asked, "--to", "text", "--max-new-tokens", "4", "--json"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert isinstance(told["samples"][0]["text"], str)
    with pytest.raises(ValueError, match="makes text, not 'image'"):
        command.run(parser.parse_args([*asked, "--to", "image", "--out", str(tmp_path / "a.png")]))


def test_what_is_no_document_is_refused(ernie, folder, tmp_path):
    with pytest.raises(ValueError, match="put it into a list"):
        ernie.answer("what?")
    with pytest.raises(EncoderError, match="input 0"):
        ernie.answer([[3.5, "what?"]])
    with pytest.raises(EncoderError, match="must have one size"):
        ernie.answer([[[small(PICTURES[0]), Image.new("RGB", (20, 20))], "what?"]])
    with pytest.raises(ValueError, match="more than the 400 that the model was made for"):
        ernie.answer(["a" * 500])
    shutil.copytree(folder, tmp_path / "silent", ignore=lambda *_: ["tokenizer.json"])
    with pytest.raises(TokenizerError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        Ernie45VL.from_pretrained(tmp_path / "silent")


def test_a_tokenizer_of_sentencepiece(folder, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    shutil.copytree(folder, tmp_path / "old", ignore=lambda *_: ["tokenizer.json"])
    text = tmp_path / "words.txt"
    text.write_text("a picture of a cat\nwhat is it?\nUser: see the red apple on a table\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "old" / "tokenizer"), vocab_size=60, model_type="bpe",
        byte_fallback=False, control_symbols=[BEGIN], minloglevel=2,
    )  # fmt: skip
    read = Ernie45VL.from_pretrained(tmp_path / "old").tokenizer
    assert read.decode(read.encode("a picture of a cat")) == "a picture of a cat"
    assert len(read.encode("a picture")) < len("a picture")
