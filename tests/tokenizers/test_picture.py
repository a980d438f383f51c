from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.codec import WEIGHTS
from omnimoe.tokenizers.picture import PictureTokenizer
from omnimoe.tokenizers.raster import to_square

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("picture")


def psnr(made: np.ndarray, real: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(made.astype(float) - real).mean())


def test_the_shipped_tokenizer_says_what_it_is(tokenizer):
    assert isinstance(tokenizer, PictureTokenizer)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.num_tokens == 64
    assert tokenizer.grid == (8, 8)
    assert (WEIGHTS / tokenizer.shipped).stat().st_size < 6 * 2**20


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_unseen_pictures_come_back(tokenizer, path):
    ids = tokenizer.encode(path)
    assert ids.shape == (64,)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    made = tokenizer.decode(ids)
    assert made.shape == (64, 64, 3)
    assert made.dtype == np.uint8
    assert psnr(made, np.asarray(Image.open(path).convert("RGB"))) > 17


def test_unseen_pictures_come_back_well_on_average(tokenizer):
    real = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in PICTURES])
    made = tokenizer.decode_batch(tokenizer.encode_batch(real))
    assert np.mean([psnr(a, b) for a, b in zip(made, real, strict=True)]) > 20


def test_one_and_many_agree_and_repeat(tokenizer):
    batch = tokenizer.encode_batch(PICTURES)
    assert batch.shape == (len(PICTURES), 64)
    assert torch.equal(batch, tokenizer.encode_batch(PICTURES))
    one_by_one = torch.stack([tokenizer.encode(path) for path in PICTURES])
    # Another batch size may sum in another order, which can tip a value that lies on a rounding edge.
    assert (batch == one_by_one).float().mean() > 0.99
    again = tokenizer.decode_batch(batch)
    assert np.array_equal(again, tokenizer.decode_batch(batch))
    assert np.abs(tokenizer.decode(batch[0]).astype(int) - again[0]).max() <= 1


def test_every_kind_of_input_gives_the_same_ids(tokenizer):
    path = PICTURES[0]
    picture = Image.open(path).convert("RGB")
    expected = tokenizer.encode(path)
    for raw in (str(path), picture, np.asarray(picture), torch.from_numpy(np.array(picture)), picture.convert("RGBA")):
        assert torch.equal(tokenizer.encode(raw), expected)


def test_other_sizes_are_set_on_a_white_square():
    square = to_square(np.zeros((10, 30, 3), np.uint8), 30)
    assert square.shape == (30, 30, 3)
    assert (square[10:20] == 0).all()
    assert (square[:10] == 255).all()
    assert (square[20:] == 255).all()
    clear = np.zeros((8, 8, 4), np.uint8)
    assert (to_square(clear, 64) == 255).all()
    assert to_square(np.full((5, 5), 7, np.uint8), 64).max() == 7


def test_ids_can_be_trained_on(tokenizer):
    embedding = torch.nn.Embedding(tokenizer.vocab_size, 2)
    embedding(tokenizer.encode(PICTURES[0])).sum().backward()
    assert embedding.weight.grad is not None


def test_an_empty_batch_is_empty(tokenizer):
    assert tokenizer.encode_batch([]).shape == (0, 64)
    assert tokenizer.decode_batch(torch.empty(0, 64, dtype=torch.long)).shape == (0, 64, 64, 3)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "uint8"),
        (np.zeros((3, 64, 64), np.uint8), "channels last"),
        (np.zeros((64,), np.uint8), "uint8 of shape"),
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (None, "a picture is a path"),
        (7, "a picture is a path"),
        ("no/such/picture.png", "no picture at"),
        (Path(__file__), "not a picture in a format"),
        (Path(__file__).parent, "cannot be read"),
    ],
)
def test_what_is_no_picture_is_refused(tokenizer, raw, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode(raw)


def test_a_huge_picture_is_scaled_and_one_beyond_the_limit_of_pillow_refused(tokenizer, tmp_path, monkeypatch):
    small = np.asarray(Image.open(PICTURES[0]).convert("RGB").resize((64, 64)))
    huge = small.repeat(47, 0).repeat(47, 1)
    assert huge.shape == (3_008, 3_008, 3)
    ids = tokenizer.encode(huge)
    assert len(ids) == 64
    assert psnr(tokenizer.decode(ids), tokenizer.decode(tokenizer.encode(small))) > 25
    assert len(tokenizer.encode(huge[:2])) == 64
    Image.new("1", (3_000, 3_000)).save(tmp_path / "huge.png")
    assert psnr(tokenizer.decode(tokenizer.encode(tmp_path / "huge.png")), np.zeros((64, 64, 3))) > 25
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000_000)
    with pytest.raises(TokenizerError, match="exceeds limit"):
        tokenizer.encode(tmp_path / "huge.png")


def test_a_file_cut_short_is_refused(tokenizer, tmp_path):
    whole = PICTURES[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizer.encode(tmp_path / "cut.png")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((64,), 1000), r"0\.\.999"),
        (torch.full((64,), -1), r"0\.\.999"),
        (torch.zeros(63, dtype=torch.long), "64 ids, not 63"),
        (torch.zeros(64), "integers"),
        (torch.zeros(64, dtype=torch.bool), "integers"),
        (torch.zeros(2, 64, dtype=torch.long), "decode_batch"),
        ("ids", "integers"),
    ],
)
def test_what_are_no_ids_is_refused(tokenizer, ids, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode(ids)


def test_saved_and_read_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["picture_tokenizer.safetensors"]
    again = PictureTokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(PICTURES[1]), tokenizer.encode(PICTURES[1]))


def test_a_small_network_of_another_shape_works():
    config = PictureTokenizer.Config(image_size=32, hidden_size=20, encoder_blocks=1, decoder_blocks=1, levels=(4, 4))
    tokenizer = config.build()
    assert (tokenizer.vocab_size, tokenizer.num_tokens, tokenizer.grid) == (16, 16, (4, 4))
    assert tokenizer.decode(tokenizer.encode(PICTURES[0])).shape == (32, 32, 3)
    assert PictureTokenizer.Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("change", [{"image_size": 60}, {"image_size": 0}, {"hidden_size": 161}])
def test_a_config_that_cannot_be_built_is_refused(change):
    with pytest.raises(ConfigError, match="must be a multiple"):
        PictureTokenizer.Config().replace(**change).build()


def test_files_that_do_not_fit_are_refused(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match="no picture tokenizer at"):
        PictureTokenizer.from_pretrained(tmp_path)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors")
    with pytest.raises(TokenizerError, match="not a tokenizer file"):
        PictureTokenizer.from_pretrained(damaged)
    speech = tmp_path / "speech.safetensors"
    load_tokenizer("speech").save_pretrained(speech)
    with pytest.raises(TokenizerError, match="holds a 'speech' tokenizer"):
        PictureTokenizer.from_pretrained(speech)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "picture_tokenizer.safetensors"
    # The same length, so that the header stays readable and only the sizes disagree.
    file.write_bytes(file.read_bytes().replace(b'\\"hidden_size\\": 200', b'\\"hidden_size\\": 120'))
    with pytest.raises(TokenizerError, match="do not fit the config"):
        PictureTokenizer.from_pretrained(file)
