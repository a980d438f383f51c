"""The adapter of diffusers' autoencoder gives what the class gives, bit for bit."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.latents import from_patches, to_patches
from tests.tokenizers.adapted import PICTURES

diffusers = pytest.importorskip("diffusers", reason="needs diffusers, the extra 'diffusers'")


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 32), "latent_channels": 4, "sample_size": 32, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**{**sizes, **blocks, **changes}).eval()


@pytest.fixture(scope="module")
def model():
    return tiny(shift_factor=0.1)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer("autoencoder_kl", folder)


def pixels(path):
    picture = np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].contiguous().float() / 127.5 - 1


def test_it_says_what_it_is(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.channels, tokenizer.num_tokens) == (0, 16, 64)
    assert (tokenizer.grid, tokenizer.image_size) == ((8, 8), 32)
    assert (tokenizer.is_discrete, tokenizer.is_continuous) == (False, True)
    span = tokenizer(PICTURES[0])
    assert span.ids is None
    assert span.rows.shape == (64, 16)
    assert (span.modality, span.markers) == ("image", ("<image>", "</image>"))
    assert span.positions[9].tolist() == [0, 1, 1]


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@torch.no_grad()
def test_rows_are_the_latents_of_the_class(folder, model, patch_size):
    tokenizer = load_tokenizer("autoencoder_kl", folder, patch_size=patch_size)
    latents = (model.encode(pixels(PICTURES[0])).latent_dist.mean - 0.1) * model.config.scaling_factor
    rows = tokenizer.encode_rows(PICTURES[0])
    assert rows.dtype == torch.float32
    side = 16 // patch_size
    assert rows.shape == (side * side, 4 * patch_size**2)
    # The second patch of the second row of patches, by hand.
    top, left = patch_size, patch_size
    patch = latents[0, :, top : top + patch_size, left : left + patch_size]
    assert torch.equal(rows[side + 1], patch.flatten())
    assert torch.equal(rows, tokenizer.encode_rows(PICTURES[0]))


@torch.no_grad()
def test_pictures_are_those_of_the_class(tokenizer, model):
    rows = tokenizer.encode_rows(PICTURES[0])
    latents = from_patches(rows[None], (8, 8), 2) / model.config.scaling_factor + 0.1
    direct = model.decode(latents).sample[0]
    expected = ((direct.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    made = tokenizer.decode_rows(rows)
    assert made.shape == (32, 32, 3)
    assert np.array_equal(made, expected)
    assert np.array_equal(made, tokenizer.decode_rows(rows.tolist()))


@torch.no_grad()
def test_means_and_deviations_of_the_config_are_taken(tmp_path):
    model = tiny(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("autoencoder_kl", tmp_path, patch_size=1)
    latents = model.encode(pixels(PICTURES[0])).latent_dist.mean
    third = (latents[0, 2] - 0.3) / 3 * model.config.scaling_factor
    torch.testing.assert_close(tokenizer.encode_rows(PICTURES[0])[:, 2], third.flatten())
    direct = model.decode(latents).sample[0].clamp(-1, 1)
    made = torch.from_numpy(tokenizer.decode_rows(tokenizer.encode_rows(PICTURES[0]))).permute(2, 0, 1) / 127.5 - 1
    assert (made - direct).abs().max() < 0.01


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_patches_are_exact_inverses(patch_size):
    latents = torch.randn(2, 4, 4 * patch_size, 5 * patch_size)
    rows = to_patches(latents, patch_size)
    assert rows.shape == (2, 20, 4 * patch_size**2)
    assert torch.equal(from_patches(rows, (4, 5), patch_size), latents)


def test_a_batch_has_a_row_for_each_picture(tokenizer):
    rows = tokenizer.encode_rows_batch(PICTURES)
    assert rows.shape == (len(PICTURES), 64, 16)
    torch.testing.assert_close(rows[4], tokenizer.encode_rows(PICTURES[4]))
    assert tokenizer.decode_rows_batch(rows).shape == (len(PICTURES), 32, 32, 3)
    assert tokenizer.encode_rows_batch([]).shape == (0, 64, 16)
    assert tokenizer.decode_rows_batch(rows[:0]).shape == (0, 32, 32, 3)


def test_the_folder_of_a_pipeline_will_do(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "vae")
    again = load_tokenizer("autoencoder_kl", tmp_path)
    assert torch.equal(again.encode_rows(PICTURES[0]), tokenizer.encode_rows(PICTURES[0]))


def test_saved_and_read_it_is_the_same(folder, tmp_path):
    tokenizer = load_tokenizer("autoencoder_kl", folder, patch_size=4, image_size=64)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer("autoencoder_kl", tmp_path)
    assert (again.config, again.num_tokens) == (tokenizer.config, 64)
    assert torch.equal(again.encode_rows(PICTURES[0]), tokenizer.encode_rows(PICTURES[0]))


def test_sizes_that_do_not_fit_are_refused(folder):
    with pytest.raises(ConfigError, match="multiple of 4, 2 pixels a latent cell and 2 cells a patch; got 34"):
        load_tokenizer("autoencoder_kl", folder, image_size=34)
    with pytest.raises(ConfigError, match="patch_size must be at least 1, got 0"):
        load_tokenizer("autoencoder_kl", folder, patch_size=0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "uint8"),
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (None, "a picture is a path"),
        (Path(__file__), "not a picture in a format"),
    ],
)
def test_what_is_no_picture_is_refused(tokenizer, raw, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode_rows(raw)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(63, 16), "64 rows, not 63"),
        (torch.zeros(64, 15), r"\(n, 16\)"),
        (torch.full((64, 16), torch.inf), "NaN or infinite"),
        (torch.zeros(2, 64, 16), "decode_rows_batch"),
        (torch.zeros(64, 16, dtype=torch.long), "floating point"),
    ],
)
def test_what_are_no_rows_is_refused(tokenizer, rows, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode_rows(rows)


def test_what_is_no_such_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match="cannot be read as AutoencoderKL"):
        load_tokenizer("autoencoder_kl", tmp_path)
    with pytest.raises(TokenizerError, match="call encode_rows"):
        tokenizer.encode(PICTURES[0])


def test_a_missing_library_is_named_with_its_extra(folder, monkeypatch):
    real = builtins.__import__

    def without_diffusers(name, *arguments, **options):
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    with pytest.raises(TokenizerError, match=r"pip install 'omnimoe\[diffusers\]'"):
        load_tokenizer("autoencoder_kl", folder)
