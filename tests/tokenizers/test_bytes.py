from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.text import BOS_ID, EOS_ID, SPECIAL_TOKENS

TOKENIZER = load_tokenizer("bytes")


@given(st.text())
def test_round_trip_is_exact(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_markers_come_first_and_are_not_text() -> None:
    ids = TOKENIZER.encode("".join(SPECIAL_TOKENS))
    assert int(ids.min()) >= len(SPECIAL_TOKENS)
    assert TOKENIZER.decode([BOS_ID, *TOKENIZER.encode("a lion").tolist(), EOS_ID]) == "a lion"


def test_the_empty_text_is_an_empty_span() -> None:
    span = TOKENIZER("")
    assert len(span) == 0
    assert span.ids.dtype == torch.int64
    assert TOKENIZER.decode([]) == ""


def test_bytes_that_are_no_character_are_replaced() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("狮")[:2]) == "\ufffd"


def test_it_stands_in_for_the_text_of_a_document() -> None:
    from omnimoe.data.documents import lay_out
    from omnimoe.modalities.vocabulary import TokenRange

    ranges = {"text": TokenRange(name="text", start=0, size=TOKENIZER.vocab_size)}
    piece = lay_out([("text", TOKENIZER.encode("ox").numpy())], ranges, bos_id=BOS_ID, eos_id=EOS_ID)
    assert piece.ids.tolist() == [BOS_ID, 16 + ord("o"), 16 + ord("x"), EOS_ID]


def test_nothing_needs_to_be_saved(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    assert load_tokenizer("bytes", tmp_path).decode(TOKENIZER.encode("ox")) == "ox"


@pytest.mark.parametrize(("raw", "message"), [(b"ox", "str, not bytes"), (None, "NoneType"), ("a\ud800", "surrogate")])
def test_what_is_no_text_is_refused(raw, message) -> None:
    with pytest.raises(TokenizerError, match=message):
        TOKENIZER.encode(raw)


@pytest.mark.parametrize(("ids", "message"), [([272], r"0\.\.271"), ([[20]], "one text"), ([0.5], "integers")])
def test_what_are_no_ids_is_refused(ids, message) -> None:
    with pytest.raises(TokenizerError, match=message):
        TOKENIZER.decode(ids)
