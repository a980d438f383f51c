"""Encoders of transformers at a tiny size, saved to a folder and read back, against the original used directly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from omnimoe.config import ConfigError
from omnimoe.encoders import EncoderError, load_encoder

PICTURES = sorted((Path(__file__).parents[1] / "fixtures" / "pictures").glob("*.png"))
_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SIGHT = {**_SIZE, "image_size": 32, "patch_size": 8}


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**_SIGHT)), "ViTImageProcessor"


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**_SIGHT)), "ViTImageProcessor"


def dinov2_with_registers():
    form = transformers.Dinov2WithRegistersConfig(**_SIGHT, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(form), "ViTImageProcessor"


def clip():
    text = {**_SIZE, "vocab_size": 50}
    form = transformers.CLIPConfig(text_config=text, vision_config=_SIGHT, projection_dim=8)
    return transformers.CLIPModel(form), "CLIPImageProcessor"


def clip_vision():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_SIGHT)), "CLIPImageProcessor"


def siglip():
    form = transformers.SiglipConfig(text_config={**_SIZE, "vocab_size": 50}, vision_config=_SIGHT)
    return transformers.SiglipModel(form), "SiglipImageProcessor"


@pytest.fixture
def saved(tmp_path):
    def save(make):
        model, processor = make()
        model.eval().save_pretrained(tmp_path)
        if processor.endswith("ImageProcessor"):
            sizes = {"size": {"height": 32, "width": 32}}
            if processor == "CLIPImageProcessor":
                sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
            getattr(transformers, processor)(**sizes).save_pretrained(tmp_path)
        else:
            getattr(transformers, processor)().save_pretrained(tmp_path)
        return model, tmp_path

    return save


@pytest.mark.parametrize(
    ("make", "first"),
    [(vit, 1), (dinov2, 1), (dinov2_with_registers, 4), (clip, 1), (clip_vision, 1), (siglip, 0)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_vision(saved, make, first):
    model, folder = saved(make)
    encoder = load_encoder("hf_vision", source=str(folder))
    found = encoder.encode(PICTURES[:3], batch_size=2)
    assert (found.rows.shape, found.grid, found.mask) == ((3, 16, 16), (4, 4), None)
    assert encoder.hidden_size == 16
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=[Image.open(path).convert("RGB") for path in PICTURES[:3]], return_tensors="pt")
    with torch.no_grad():
        wanted = getattr(model, "vision_model", model)(pixel_values=encoder.prepare(PICTURES[:3])["pixel_values"])
    # pictures are set on a white square of the model's size first, so pixels agree but for the resampling
    assert pixels["pixel_values"].shape == (3, 3, 32, 32)
    torch.testing.assert_close(found.rows, wanted.last_hidden_state[:, first:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, wanted.pooler_output, rtol=1e-5, atol=1e-5)


def whisper():
    form = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=60,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperModel(form), "WhisperFeatureExtractor"


def _hearing(norm: str) -> dict:
    return {
        **_SIZE,
        "vocab_size": 40,
        "num_feat_extract_layers": 3,
        "conv_dim": (8, 8, 8),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (5, 2, 2),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
    }


def wav2vec2():
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_hearing("layer"))), "Wav2Vec2FeatureExtractor"


def hubert():
    return transformers.HubertModel(transformers.HubertConfig(**_hearing("group"))), "Wav2Vec2FeatureExtractor"


def tone(samples: int) -> np.ndarray:
    return np.sin(np.arange(samples) * 0.05).astype(np.float32) * 0.5


def test_a_whisper_gives_its_encoder(saved):
    model, folder = saved(whisper)
    encoder = load_encoder("hf_audio", source=str(folder))
    found = encoder.encode([tone(16_000), tone(32_000)])
    assert found.rows.shape == (2, 1500, 16)
    assert found.mask.sum(1).tolist() == [50, 100]
    heard = transformers.WhisperFeatureExtractor()(
        [tone(16_000), tone(32_000)], sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model.encoder(heard["input_features"]).last_hidden_state
    torch.testing.assert_close(found.rows, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [wav2vec2, hubert], ids=lambda make: make.__name__)
def test_waveform_models(saved, make):
    model, folder = saved(make)
    encoder = load_encoder("hf_audio", source=str(folder))
    clips = [tone(3200), tone(1600)]
    found = encoder.encode(clips)
    alone = encoder.encode(clips[:1])
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(extractor(clips[0], sampling_rate=16_000, return_tensors="pt")["input_values"]).last_hidden_state
    torch.testing.assert_close(alone.rows, wanted, rtol=1e-4, atol=1e-4)
    assert alone.mask.all()
    assert found.mask.sum(1).tolist() == [wanted.shape[1], int(model._get_feat_extract_output_lengths(1600))]
    assert found.pooled.isfinite().all()
    if make is wav2vec2:  # a model without a mask sees the padding
        torch.testing.assert_close(found.pooled[:1], alone.pooled, rtol=1e-3, atol=1e-3)


def test_other_rates_are_resampled(saved):
    _, folder = saved(wav2vec2)
    encoder = load_encoder("hf_audio", source=str(folder))
    assert encoder.encode([tone(1600)], sample_rate=8000).rows.shape == encoder.encode([tone(3200)]).rows.shape


def test_its_config_builds_the_same_structure(saved):
    _, folder = saved(vit)
    encoder = load_encoder("hf_vision", source=str(folder))
    again = type(encoder.config).from_dict(encoder.config.to_dict()).build(weights=False)
    assert again.config == encoder.config
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.encode(PICTURES[:1]).rows, encoder.encode(PICTURES[:1]).rows)


def test_a_pooler_that_is_missing_is_not_made_up(saved):
    _, folder = saved(vit)
    held = load_file(folder / "model.safetensors")
    rest = {name: value for name, value in held.items() if "pooler" not in name}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_encoder("hf_vision", source=str(folder)).encode(PICTURES[:1])
    torch.testing.assert_close(found.pooled, found.rows.mean(1))
    short = {name: value for name, value in rest.items() if "layernorm" not in name}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="lack layernorm"):
        load_encoder("hf_vision", source=str(folder))


def test_what_is_no_such_encoder_is_refused(saved, tmp_path):
    with pytest.raises(ConfigError, match="source must name"):
        load_encoder("hf_vision")
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(EncoderError, match=re.escape(nowhere)):
        load_encoder("hf_vision", source=nowhere)
    model, folder = saved(vit)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="no encoder can be loaded"):
        load_encoder("hf_vision", source=str(folder))


def convnext():
    form = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32, patch_size=4)
    return transformers.ConvNextModel(form), "ViTImageProcessor"


def resnet():
    form = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1])
    return transformers.ResNetModel(form), "ViTImageProcessor"


def swin():
    form = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=6, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    return transformers.SwinModel(form), "ViTImageProcessor"


@pytest.mark.parametrize("make", [convnext, resnet, swin], ids=lambda make: make.__name__)
def test_networks_that_shrink_their_grid(saved, make):
    model, folder = saved(make)
    encoder = load_encoder("hf_vision", source=str(folder))
    found = encoder.encode(PICTURES[:2])
    assert (found.rows.shape, found.grid, encoder.hidden_size) == ((2, 16, 12), (4, 4), 12)
    with torch.no_grad():
        wanted = model(**encoder.prepare(PICTURES[:2]))
    hidden = wanted.last_hidden_state
    hidden = hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.rows, hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, wanted.pooler_output.flatten(1), rtol=1e-4, atol=1e-5)
