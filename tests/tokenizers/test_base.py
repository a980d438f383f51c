"""The interface that all tokenizers share: spans with ids, rows or both, and the checks before decoding."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.data.documents import default_ranges, lay_out
from omnimoe.tokenizers import TOKENIZERS, Encoded, Tokenizer, TokenizerError, load_tokenizer, register_tokenizer
from omnimoe.tokenizers.base import MARKERS
from omnimoe.tokenizers.bytes import ByteTokenizer
from omnimoe.tokenizers.text import SPECIAL_TOKENS

FIXTURES = Path(__file__).parents[1] / "fixtures"
PICTURE = FIXTURES / "pictures" / "pig.png"


def clip() -> np.ndarray:
    with wave.open(str(next((FIXTURES / "speech").glob("*.wav"))), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").copy()


class BitTokenizer(ByteTokenizer):
    """Bytes as ids, and as rows of eight bits, to have a tokenizer that gives both."""

    channels = 8

    def encode_rows(self, raw):
        values = np.frombuffer(raw.encode(), np.uint8)
        return torch.from_numpy(np.unpackbits(values[:, None], axis=1).astype(np.float32))

    def decode_rows(self, rows):
        bits = (self.check_rows(rows) > 0.5).numpy()
        return np.packbits(bits, axis=1).tobytes().decode()


@pytest.fixture(scope="module")
def both() -> BitTokenizer:
    return BitTokenizer.from_pretrained()


@pytest.mark.parametrize(
    ("name", "raw", "modality", "markers"),
    [
        ("text", "a lion", "text", None),
        ("bytes", "a lion", "text", None),
        ("picture", PICTURE, "image", ("<image>", "</image>")),
        ("speech", clip(), "speech", ("<speech>", "</speech>")),
    ],
)
def test_a_call_gives_the_whole_span(name, raw, modality, markers):
    tokenizer = load_tokenizer(name)
    span = tokenizer(raw)
    assert (span.modality, span.markers) == (modality, markers)
    assert (tokenizer.is_discrete, tokenizer.is_continuous) == (True, False)
    assert torch.equal(span.ids, tokenizer.encode(raw))
    assert span.rows is None
    assert len(span) == len(span.ids)
    assert span.positions.shape == (len(span), 3)
    assert span.positions.dtype == torch.int64


@pytest.mark.parametrize("name", ["text", "bytes", "picture", "picture_latents", "speech", "video"])
def test_loading_leaves_the_global_generator_alone(name):
    state = torch.get_rng_state()
    load_tokenizer(name)
    assert torch.equal(state, torch.get_rng_state())


def test_arguments_of_encode_pass_through_a_call():
    tokenizer = load_tokenizer("speech")
    assert len(tokenizer(clip(), sample_rate=48_000)) < len(tokenizer(clip())) / 2.5


def test_positions_follow_the_axes_of_the_modality():
    line = load_tokenizer("text")("a lion").positions
    assert torch.equal(line, torch.arange(len(line)).unsqueeze(1).expand(-1, 3))
    grid = load_tokenizer("picture")(PICTURE).positions
    assert grid[:9].tolist() == [[0, 0, column] for column in range(8)] + [[0, 1, 0]]
    assert grid[-1].tolist() == [0, 7, 7]


def test_a_document_takes_rows_and_columns_from_the_positions():
    ranges = default_ranges()
    span = load_tokenizer("picture")(PICTURE)
    piece = lay_out([("image", span.ids.numpy())], ranges, bos_id=1, grids={"image": (8, 8)})
    assert np.array_equal(piece.positions[2:66, 1:], 2 + span.positions[:, 1:].numpy())


def test_marker_names_are_in_the_vocabulary_of_the_default_ranges():
    assert all(name in SPECIAL_TOKENS for pair in MARKERS.values() for name in pair)
    for name, held in default_ranges().items():
        if name in MARKERS:
            assert (SPECIAL_TOKENS[held.begin_id], SPECIAL_TOKENS[held.end_id]) == MARKERS[name]


def test_ids_and_rows_may_come_together(both):
    span = both("a lion")
    assert (both.is_discrete, both.is_continuous) == (True, True)
    assert span.ids.shape == (6,)
    assert span.rows.shape == (6, 8)
    assert both.decode_rows(span.rows) == both.decode(span.ids) == "a lion"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(6, 3), r"\(n, 8\)"),
        (torch.zeros(8), r"\(n, 8\)"),
        (torch.zeros(6, 8, dtype=torch.long), "floating point"),
        (torch.full((6, 8), torch.nan), "48 of 48 values are NaN"),
        ("rows", "tensor or sequence"),
        ([[0.0] * 8, [0.0] * 7], "tensor or sequence"),
    ],
)
def test_what_are_no_rows_is_refused(both, rows, message):
    with pytest.raises(TokenizerError, match=message):
        both.decode_rows(rows)


def test_a_fixed_length_holds_for_rows_too(both):
    fixed = BitTokenizer.from_pretrained()
    fixed.num_tokens = 4
    with pytest.raises(TokenizerError, match="4 rows, not 6"):
        fixed.decode_rows(both("a lion").rows)


def test_the_other_form_is_refused_by_name():
    text = load_tokenizer("text")
    with pytest.raises(TokenizerError, match="no rows; call encode"):
        text.encode_rows("a")
    with pytest.raises(TokenizerError, match="no rows to decode; call decode"):
        text.decode_rows(torch.zeros(1, 1))


def test_a_continuous_tokenizer_needs_rows_alone():
    class Brightness(Tokenizer):
        """One row of three means."""

        modality, channels = "image", 3

        def encode_rows(self, raw):
            return torch.from_numpy(np.asarray(Image.open(raw)).mean((0, 1), dtype=np.float32))[None]

    span = Brightness(Brightness.Config())(PICTURE)
    assert span.ids is None
    assert span.rows.shape == (1, 3)
    with pytest.raises(TokenizerError, match="call encode_rows"):
        Brightness(Brightness.Config()).encode(PICTURE)
    with pytest.raises(TokenizerError, match="call decode_rows"):
        Brightness(Brightness.Config()).decode([1])


def test_a_span_without_content_or_of_two_lengths_is_refused():
    positions = torch.zeros(3, 3, dtype=torch.long)
    with pytest.raises(TokenizerError, match="no ids or rows"):
        Encoded(modality="image", positions=positions)
    with pytest.raises(TokenizerError, match=r"3 positions and \[2, 3\]"):
        Encoded(modality="image", positions=positions, ids=torch.zeros(3), rows=torch.zeros(2, 1))
    with pytest.raises(TokenizerError, match="neither vocab_size nor channels"):
        Tokenizer(Tokenizer.Config())("raw")


def test_an_option_that_a_tokenizer_does_not_have_is_refused():
    with pytest.raises(TokenizerError, match="'text' is loaded without such options.*num_codebooks"):
        load_tokenizer("text", num_codebooks=8)


def test_options_reach_a_tokenizer_of_ones_own():
    @register_tokenizer("nibbles")
    class NibbleTokenizer(Tokenizer):
        """Half bytes."""

        def __init__(self, config, first):
            super().__init__(config)
            self.vocab_size = 16 + first

        @classmethod
        def from_pretrained(cls, path=None, *, first=0):
            return cls(cls.Config(), first)

    try:
        assert load_tokenizer("nibbles", first=2).vocab_size == 18
    finally:
        TOKENIZERS.remove("nibbles")


def test_built_in_tokenizers_import_no_large_library():
    import subprocess
    import sys

    program = (
        "import sys; from omnimoe.tokenizers import TOKENIZERS; TOKENIZERS.names();"
        "print(sorted({'transformers', 'diffusers', 'pycodec2', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
