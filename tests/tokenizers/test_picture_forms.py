"""The other forms of our picture tokenizer: continuous latents, and codes of larger pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.picture import LargePictureTokenizer, PictureLatentTokenizer, PictureTokenizer
from omnimoe.tokenizers.training.picture import start_from

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))


def pixels(size: int) -> np.ndarray:
    """The unseen pictures, ``(B, size, size, 3)`` uint8."""
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size), 3)) for path in PICTURES])


def psnr(made: np.ndarray, real: np.ndarray) -> float:
    return float(np.mean(10 * np.log10(255**2 / np.square(made.astype(float) - real).mean((1, 2, 3)))))


@pytest.fixture(scope="module")
def latents() -> PictureLatentTokenizer:
    return load_tokenizer("picture_latents")


@pytest.fixture(scope="module")
def large() -> LargePictureTokenizer:
    """A small one of fresh weights."""
    torch.manual_seed(0)
    made = LargePictureTokenizer(LargePictureTokenizer.Config(hidden_size=40, encoder_blocks=1, decoder_blocks=1))
    made.network.half().float()  # files hold float16
    return made


def test_latents_bring_unseen_pictures_back_better_than_codes(latents):
    real = pixels(64)
    rows = latents.encode_rows_batch(real)
    assert rows.shape == (len(real), 64, latents.channels)
    assert rows.dtype == torch.float32
    codes = load_tokenizer("picture")
    by_codes = psnr(codes.decode_batch(codes.encode_batch(real)), real)
    assert psnr(latents.decode_rows_batch(rows), real) > by_codes + 1


def test_latents_are_of_unit_scale_and_stand_noise(latents):
    real = pixels(64)
    rows = latents.encode_rows_batch(real)
    assert 0.5 < float(rows.std()) < 2
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    noisy = latents.decode_rows_batch(rows + 0.1 * noise)
    assert psnr(noisy, latents.decode_rows_batch(rows)) > 20


def test_a_picture_of_latents_is_a_span(latents):
    span = latents(PICTURES[0])
    assert span.ids is None
    assert span.rows.shape == (64, latents.channels)
    assert span.positions[9].tolist() == [0, 1, 1]
    assert latents.decode_rows(span.rows).shape == (64, 64, 3)
    assert torch.equal(span.rows, latents.encode_rows(PICTURES[0]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(63, 16), "64 rows, not 63"),
        (torch.zeros(64, 15), r"\(n, 16\)"),
        (torch.zeros(2, 64, 16), "decode_rows_batch"),
        (torch.full((64, 16), torch.nan), "NaN"),
        (torch.zeros(64, 16, dtype=torch.long), "floating point"),
    ],
)
def test_what_are_no_rows_is_refused(latents, rows, message):
    with pytest.raises(TokenizerError, match=message):
        latents.decode_rows(rows)


def test_one_form_is_not_the_other(latents, large):
    with pytest.raises(TokenizerError, match="call encode_rows"):
        latents.encode(PICTURES[0])
    with pytest.raises(TokenizerError, match="call encode"):
        large.encode_rows(PICTURES[0])
    with pytest.raises(ConfigError, match="channels must be at least 1"):
        PictureLatentTokenizer.Config(channels=0).build()


def test_larger_pictures_have_256_codes(large):
    real = pixels(128)
    ids = large.encode_batch(real)
    assert ids.shape == (len(real), 256)
    assert large.grid == (16, 16)
    assert large.decode_batch(ids).shape == real.shape
    assert torch.equal(large.encode(PICTURES[0]), large.encode_batch([PICTURES[0]])[0])


def test_codes_of_larger_pictures_bring_back_more_than_those_of_small_ones_enlarged():
    real = pixels(128)
    shipped, codes = load_tokenizer("picture_128"), load_tokenizer("picture")
    small = codes.decode_batch(codes.encode_batch(pixels(64)))
    enlarged = np.stack([np.asarray(Image.fromarray(picture).resize((128, 128), 3)) for picture in small])
    assert psnr(shipped.decode_batch(shipped.encode_batch(real)), real) > psnr(enlarged, real) + 2


def test_a_form_without_shipped_weights_says_so(monkeypatch):
    monkeypatch.setattr(LargePictureTokenizer, "shipped", "absent.safetensors")
    with pytest.raises(TokenizerError, match="no picture_128 tokenizer at .*absent.safetensors; pass a file"):
        load_tokenizer("picture_128")


def test_saved_and_read_they_are_the_same(latents, large, tmp_path):
    for tokenizer in (latents, large):
        tokenizer.save_pretrained(tmp_path)
    rows = latents.encode_rows_batch(pixels(64))
    assert torch.equal(type(latents).from_pretrained(tmp_path).encode_rows_batch(pixels(64)), rows)
    again = type(large).from_pretrained(tmp_path)
    assert torch.equal(again.encode_batch(pixels(128)), large.encode_batch(pixels(128)))
    with pytest.raises(TokenizerError, match="holds a 'picture_latents' tokenizer, not 'picture'"):
        PictureTokenizer.from_pretrained(tmp_path / "picture_latents_tokenizer.safetensors")


def test_a_training_starts_from_the_weights_of_another_form(tmp_path):
    small = PictureTokenizer.Config(hidden_size=40, encoder_blocks=1, decoder_blocks=1).build()
    small.save_pretrained(tmp_path)
    config = LargePictureTokenizer.Config(hidden_size=40, encoder_blocks=1, decoder_blocks=1)
    network = config.build().network
    start_from(network, tmp_path / "picture_tokenizer.safetensors")
    torch.testing.assert_close(network.to_codes[1].weight, small.network.to_codes[1].weight, atol=1e-3, rtol=1e-3)
    grid = network.encoder_positions.unflatten(0, (16, 16))
    mean = grid.unflatten(0, (8, 2)).unflatten(2, (8, 2)).mean((1, 3))
    # resampled, so a cell of the small grid and the four that lie on it agree inside
    inner = small.network.encoder_positions.unflatten(0, (8, 8))[1:-1, 1:-1]
    assert float((mean[1:-1, 1:-1] * inner).sum() / (mean[1:-1, 1:-1].norm() * inner.norm())) > 0.8
