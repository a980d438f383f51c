"""The adapters of published VQ models give what the adapted class gives, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from tests.tokenizers.adapted import PICTURES, VQ_CLASSES, tiny_chat, tiny_codec, tiny_vq

SIDE = {"chameleon_vq": None, "emu3_vq": 32, "janus_vq": None}


@pytest.fixture(scope="module")
def models():
    return {name: tiny_vq(name) for name in VQ_CLASSES}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(name, folder, image_size=SIDE[name]) for name, folder in folders.items()}


def pixels(path: Path) -> torch.Tensor:
    """What the original code of all three models does to a picture of the right size."""
    picture = np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].contiguous().float() / 127.5 - 1


def direct_ids(name, model, path):
    if name == "emu3_vq":
        return model.encode(pixels(path), torch.tensor([[32, 32]])).image_tokens[0].flatten()
    return model.encode(pixels(path)).image_tokens


@pytest.mark.parametrize("name", VQ_CLASSES)
def test_it_says_what_it_is(tokenizers, name):
    tokenizer = tokenizers[name]
    assert (tokenizer.vocab_size, tokenizer.num_tokens, tokenizer.grid) == (64, 256, (16, 16))
    assert (tokenizer.modality, tokenizer.image_size) == ("image", 32)
    span = tokenizer(PICTURES[0])
    assert span.markers == ("<image>", "</image>")
    assert span.positions[17].tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", VQ_CLASSES)
@torch.no_grad()
def test_ids_are_those_of_the_class(models, tokenizers, name):
    for path in PICTURES[:3]:
        ids = tokenizers[name].encode(path)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, direct_ids(name, models[name], path))
        assert len(ids.unique()) > 3
        assert torch.equal(ids, tokenizers[name].encode(path))


@pytest.mark.parametrize("name", ["emu3_vq", "janus_vq"])
@torch.no_grad()
def test_pictures_are_those_of_the_class(models, tokenizers, name):
    ids = tokenizers[name].encode(PICTURES[0])
    direct = models[name].decode(ids.view(1, 16, 16) if name == "emu3_vq" else ids[None])[0]
    expected = ((direct.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    made = tokenizers[name].decode(ids)
    assert made.shape == (32, 32, 3)
    assert np.array_equal(made, expected)
    assert made.std() > 0
    assert np.array_equal(made, tokenizers[name].decode(ids.tolist()))


@pytest.mark.parametrize("name", VQ_CLASSES)
def test_a_batch_has_a_row_for_each_picture(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode_batch(PICTURES)
    assert ids.shape == (len(PICTURES), 256)
    assert (ids == torch.stack([tokenizer.encode(path) for path in PICTURES])).float().mean() > 0.99
    assert tokenizer.encode_batch([]).shape == (0, 256)
    if name != "chameleon_vq":
        assert tokenizer.decode_batch(ids[:5]).shape == (5, 32, 32, 3)
        assert tokenizer.decode_batch(ids[:0]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("name", VQ_CLASSES)
def test_a_whole_published_model_will_do(name, tmp_path):
    whole = tiny_chat(name)
    whole.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(name, str(tmp_path), image_size=SIDE[name])
    part = whole.model.vqmodel.state_dict()
    loaded = tokenizer.model.state_dict()
    assert part.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in part.items())


@pytest.mark.parametrize("name", VQ_CLASSES)
def test_saved_and_read_it_is_the_same(tokenizers, name, tmp_path):
    tokenizers[name].save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}_tokenizer", f"{name}_tokenizer.json"}
    again = load_tokenizer(name, tmp_path)
    assert again.config == tokenizers[name].config
    assert torch.equal(again.encode(PICTURES[1]), tokenizers[name].encode(PICTURES[1]))


def test_other_sizes_are_allowed_where_the_model_allows_them(folders):
    tokenizer = load_tokenizer("emu3_vq", folders["emu3_vq"], image_size=64)
    assert tokenizer.decode(tokenizer.encode(PICTURES[0])).shape == (64, 64, 3)
    assert load_tokenizer("chameleon_vq", folders["chameleon_vq"], image_size=16).num_tokens == 64
    with pytest.raises(ConfigError, match="image_size is 32 in this model"):
        load_tokenizer("janus_vq", folders["janus_vq"], image_size=64)
    with pytest.raises(ConfigError, match="multiple of 2, got 33"):
        load_tokenizer("emu3_vq", folders["emu3_vq"], image_size=33)
    with pytest.raises(ConfigError, match="no field 'size'"):
        load_tokenizer("emu3_vq", folders["emu3_vq"], size=64)


def test_chameleon_has_no_way_back(tokenizers):
    tokenizer = tokenizers["chameleon_vq"]
    with pytest.raises(TokenizerError, match="has no decoder"):
        tokenizer.decode(tokenizer.encode(PICTURES[0]))


@pytest.mark.parametrize("name", VQ_CLASSES)
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "uint8"),
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (None, "a picture is a path"),
        ("no/such/picture.png", "no picture at"),
        (Path(__file__), "not a picture in a format"),
    ],
)
def test_what_is_no_picture_is_refused(tokenizers, name, raw, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizers[name].encode(raw)


def test_a_picture_beyond_the_limit_of_pillow_is_refused(tokenizers, tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(TokenizerError, match="exceeds limit"):
        tokenizers["emu3_vq"].encode(tmp_path / "huge.png")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((256,), 64), r"0\.\.63"),
        (torch.full((256,), -1), r"0\.\.63"),
        (torch.zeros(255, dtype=torch.long), "256 ids, not 255"),
        (torch.zeros(2, 256, dtype=torch.long), "decode_batch"),
        (torch.zeros(256), "integers"),
    ],
)
def test_what_are_no_ids_is_refused(tokenizers, ids, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizers["janus_vq"].decode(ids)


def test_what_is_no_such_model_is_refused(folders, tmp_path):
    with pytest.raises(TokenizerError, match="no weights of 'emu3_vq' ship"):
        load_tokenizer("emu3_vq")
    with pytest.raises(TokenizerError, match="no Emu3VQVAE at"):
        load_tokenizer("emu3_vq", tmp_path / "none")
    with pytest.raises(TokenizerError, match="cannot be read as Emu3VQVAE"):
        load_tokenizer("emu3_vq", tmp_path)
    with pytest.raises(TokenizerError, match="cannot be read as Emu3VQVAE"):
        load_tokenizer("emu3_vq", "an-organisation/that-is-not-there")
    tiny_codec("dac").save_pretrained(tmp_path / "dac")
    with pytest.raises(TokenizerError, match="JanusVQVAE"):
        load_tokenizer("janus_vq", tmp_path / "dac")
    with pytest.raises(TokenizerError, match="is no JanusVQVAE: it lacks"):
        load_tokenizer("janus_vq", folders["chameleon_vq"])


def test_a_saved_config_of_another_tokenizer_is_refused(tokenizers, tmp_path):
    tokenizers["emu3_vq"].save_pretrained(tmp_path)
    file = tmp_path / "emu3_vq_tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "type": "janus_vq"}))
    with pytest.raises(TokenizerError, match="holds a 'janus_vq' tokenizer"):
        load_tokenizer("emu3_vq", tmp_path)
    file.write_text("{")
    with pytest.raises(TokenizerError, match="is not a tokenizer config"):
        load_tokenizer("emu3_vq", tmp_path)


def test_weights_that_are_pickled_are_not_read(models, tmp_path):
    models["emu3_vq"].config.save_pretrained(tmp_path)
    torch.save(models["emu3_vq"].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TokenizerError, match="cannot be read as Emu3VQVAE"):
        load_tokenizer("emu3_vq", tmp_path)


def test_loading_leaves_the_log_settings_of_transformers_alone(folders):
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_tokenizer("emu3_vq", folders["emu3_vq"])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
