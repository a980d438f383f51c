"""The text tokenizer that ships: exact round trips, markers that text cannot forge, files, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnimoe.tokenizers.base import TokenizerError, load_tokenizer
from omnimoe.tokenizers.text import (
    BEGIN_IMAGE_ID,
    BEGIN_SPEECH_ID,
    BOS_ID,
    END_IMAGE_ID,
    END_SPEECH_ID,
    EOS_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    BpeTokenizer,
)

TOKENIZER = BpeTokenizer.from_pretrained()


@given(st.text())
def test_round_trip_is_exact(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a lion",
        "  two  spaces\t\r\n",
        "狮子 и лев",
        "👩🏽‍🚀🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "e\u0301 \u00e9",
        "\x00\x7f\ufeff",
        "<pad> <bos></image>",
    ],
)
def test_round_trip_of_hard_cases(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    assert TOKENIZER.decode(ids) == text


def test_text_cannot_forge_markers() -> None:
    ids = TOKENIZER.encode("".join(SPECIAL_TOKENS))
    assert int(ids.min()) >= len(SPECIAL_TOKENS)


def test_markers_have_fixed_ids_and_are_not_text() -> None:
    markers = [PAD_ID, BOS_ID, EOS_ID, BEGIN_IMAGE_ID, END_IMAGE_ID, BEGIN_SPEECH_ID, END_SPEECH_ID]
    assert markers == list(range(7))
    assert SPECIAL_TOKENS[7:9] == ("<video>", "</video>")
    assert [TOKENIZER.bpe.id_to_token(i) for i in range(16)] == list(SPECIAL_TOKENS)
    assert TOKENIZER.decode([BOS_ID, *TOKENIZER.encode("a lion").tolist(), EOS_ID]) == "a lion"


def test_size_is_whole_and_compresses_english() -> None:
    assert TOKENIZER.vocab_size == 2048
    assert TOKENIZER.num_tokens is None
    text = "And God said, Let there be light: and there was light."
    assert len(TOKENIZER.encode(text)) < len(text) / 2.2


def test_a_cut_character_decodes_to_the_replacement_character() -> None:
    assert "\ufffd" in TOKENIZER.decode(TOKENIZER.encode("狮")[:1])


def test_is_found_by_name() -> None:
    assert isinstance(load_tokenizer("text"), BpeTokenizer)


@pytest.mark.parametrize("target", ["folder", "folder/own.json"])
def test_saves_and_loads(tmp_path: Path, target: str) -> None:
    TOKENIZER.save_pretrained(tmp_path / target)
    again = BpeTokenizer.from_pretrained(tmp_path / target)
    assert again.encode("the lion <eos> 狮").equal(TOKENIZER.encode("the lion <eos> 狮"))
    assert load_tokenizer("text", tmp_path / target).vocab_size == 2048


def test_trains_the_same_twice() -> None:
    texts = [f"{i} lions and {i * 7} geese cross the river to sea number {i}" for i in range(200)]
    first, second = (BpeTokenizer.train(texts, vocab_size=290) for _ in range(2))
    assert first.bpe.to_str() == second.bpe.to_str()
    assert first.decode(first.encode("seven geese")) == "seven geese"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="must be a str, not bytes"):
        TOKENIZER.encode(b"a lion")
    with pytest.raises(TokenizerError, match="lone surrogate at 1"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(TokenizerError, match=r"0\.\.2047, got 2048"):
        TOKENIZER.decode([2048])
    with pytest.raises(TokenizerError, match=r"not \(1, 2\)"):
        TOKENIZER.decode([[20, 21]])
    with pytest.raises(TokenizerError, match="at least 272, got 100"):
        BpeTokenizer.train(["a"], vocab_size=100)
    with pytest.raises(TokenizerError, match="pass more text"):
        BpeTokenizer.train(["a"], vocab_size=2048)
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        BpeTokenizer.from_pretrained(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is not a tokenizer file"):
        BpeTokenizer.from_pretrained(tmp_path / "broken.json")


def test_a_file_from_before_video_had_markers_is_read(tmp_path: Path) -> None:
    older = TOKENIZER.bpe.to_str().replace("<video>", "<reserved_7>").replace("</video>", "<reserved_8>")
    (tmp_path / "older.json").write_text(older)
    again = load_tokenizer("text", tmp_path / "older.json")
    assert again.encode("a lion").equal(TOKENIZER.encode("a lion"))


def test_a_file_without_the_markers_is_refused(tmp_path: Path) -> None:
    plain = json.loads(TOKENIZER.bpe.to_str())
    vocab = plain["model"]["vocab"]
    vocab["<image>"], vocab["</image>"] = vocab["</image>"], vocab["<image>"]
    plain["added_tokens"] = []
    (tmp_path / "swapped.json").write_text(json.dumps(plain))
    with pytest.raises(TokenizerError, match="id 3 must be <image>"):
        BpeTokenizer.from_pretrained(tmp_path / "swapped.json")
