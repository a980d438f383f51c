"""Text that is streamed is the text that is returned."""

from __future__ import annotations

import pytest
import torch

from omnimoe.generate import TextSpanStreamer, generate, interleave
from tests.narrow import CONFIG, PICTURE, eager_model, narrow_model, narrow_tokenizers

TOKENIZERS = narrow_tokenizers()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("document", [{}, {"text": "a red"}, {"image": PICTURE}], ids=["nothing", "text", "picture"])
def test_what_is_streamed_is_what_is_returned(document, seed):
    pieces = []
    model = narrow_model()
    (made,) = generate(model, document, "text", tokenizers=TOKENIZERS, seed=seed, on_text=pieces.append)
    assert "".join(pieces) == made.raw
    (plain,) = generate(model, document, "text", tokenizers=TOKENIZERS, seed=seed)
    assert plain.raw == made.raw
    assert len(pieces) > 1


def test_the_text_of_an_interleaved_document():
    pieces = []
    options = {"tokenizers": TOKENIZERS, "seed": 1, "max_new_tokens": 200}
    (spans,) = interleave(eager_model(), {"text": "a"}, on_text=pieces.append, **options)
    assert len(spans) > 2
    assert "".join(pieces) == "".join(span.raw for span in spans if span.modality == "text")


def test_words_come_whole_and_other_spans_are_passed_over():
    words, pieces = TOKENIZERS["text"], []
    streamer = TextSpanStreamer(CONFIG, words, pieces.append)
    streamer.put(torch.tensor([[1, 50, 60]]))  # the prompt
    ids = words.encode("a lion, ein Löwe\n獅子 und").tolist()
    for token in [*ids, 3, *range(2_048, 2_058), 4, *words.encode(" more").tolist(), 2, 0, 0]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "a lion, ein Löwe\n獅子 und more"
    assert pieces[:2] == ["a ", "lion, "]
    assert not any("\ufffd" in piece for piece in pieces)
