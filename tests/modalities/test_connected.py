"""Features of an encoder in the model: where they enter, what learns, what is saved."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from omnimoe import from_pretrained
from omnimoe.config import ConfigError
from omnimoe.connectors import MLP, LatentQueries, Linear, Pool
from omnimoe.encoders import EncoderError, Features, load_encoder
from omnimoe.encoders.hf import HFVision
from omnimoe.flops import flops, total_params
from omnimoe.inputs import InputError
from omnimoe.modalities import Connected, Modality
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from tests.declarations import DENSE, MOT, TEXT, build

CHANNELS, PLACE, BEGIN, END = 12, 9, 10, 11


def with_image(base: OmniMoeConfig = DENSE, **fields) -> OmniMoeConfig:
    given = {"channels": CHANNELS, "connector": Linear.Config()} | fields
    image = Connected.Config(name="image", placeholder_id=PLACE, begin_id=BEGIN, end_id=END, **given)
    return base.replace(modalities=(TEXT, image))


def part_of(model) -> Connected:
    return model.model.modalities["image"]


def batch(model, features, texts=((12, 13, 14), (15, 16, 17))) -> torch.Tensor:
    spans = part_of(model).span_ids(features)
    return torch.stack([torch.cat((span, torch.tensor(text))) for span, text in zip(spans, texts, strict=True)])


@pytest.mark.parametrize("base", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("connector", [MLP.Config(), Pool.Config(), LatentQueries.Config(num_queries=2)], ids=repr)
def test_it_trains(base, connector):
    model = build(with_image(base, connector=connector))
    features = torch.randn(2, 4, CHANNELS)
    ids = batch(model, features)
    out = model(ids, features={"image": features}, labels=ids)
    out.loss.backward()
    assert out.predictions is None
    assert all(weight.grad is not None and weight.grad.any() for weight in part_of(model).parameters())
    assert not torch.allclose(out.logits, model(ids, features={"image": features + 1}).logits)


def test_rows_enter_in_order_of_batch_and_time():
    model = build(with_image(MOT))
    x = torch.randn(3, 2, CHANNELS)
    ids = torch.tensor([[12, PLACE, PLACE, 13, PLACE, PLACE, 14], [12, 13, 14, 15, 16, PLACE, PLACE]])
    found = model.model(ids, features={"image": x})
    embeds = model.model.embed_tokens(ids).clone()
    rows = part_of(model).connector(x)
    embeds[0, 1:3], embeds[0, 4:6], embeds[1, 5:7] = rows[0], rows[1], rows[2]
    kinds = (ids == PLACE).long()
    wanted = model.model(inputs_embeds=embeds, modality_ids=kinds)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)


def test_labels_at_its_positions_are_ignored():
    model = build(with_image())
    x = torch.randn(2, 4, CHANNELS)
    ids = batch(model, x)
    marked = ids.masked_fill(ids == PLACE, -100)
    found, wanted = (model(ids, features={"image": x}, labels=labels) for labels in (ids, marked))
    assert torch.equal(found.token_losses, wanted.token_losses)
    assert torch.equal(found.loss, wanted.loss)
    assert int(found.counts["text"]) == int((marked[:, 1:] != -100).sum())
    assert "image" not in found.counts
    # the same where ids at the positions belong to the text, and the caller says what they are
    kinds = (ids == PLACE).long()
    plain = ids.masked_fill(ids == PLACE, 13)
    other = model(plain, modality_ids=kinds, features={"image": x}, labels=plain)
    torch.testing.assert_close(other.loss, wanted.loss)


def test_spans_of_different_lengths():
    model = build(with_image())
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ragged = Features(rows=torch.randn(2, 3, CHANNELS), pooled=torch.zeros(2, 1), mask=mask)
    assert part_of(model).row_counts(ragged) == [2, 3]
    assert [len(ids) for ids in part_of(model).span_ids(ragged)] == [4, 5]
    ids = torch.tensor([[PLACE, PLACE, 12, 13, 14], [PLACE, PLACE, PLACE, 12, 13]])
    found = model(ids, features={"image": ragged}).logits
    alone = model(ids[:1], features={"image": ragged.rows[:1, :2]}).logits
    torch.testing.assert_close(found[:1], alone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "become 0 rows, and the sequence has 8 positions whose modality is 'image'"),
        ({"image": torch.zeros(1, 4, CHANNELS)}, "become 4 rows, and the sequence has 8 positions"),
        ({"image": torch.zeros(2, 4, CHANNELS + 1)}, r"must be \(spans, n, 12\).*got torch.float32 \(2, 4, 13\)"),
        ({"image": torch.zeros(8, CHANNELS)}, r"got torch.float32 \(8, 12\)"),
        ({"image": torch.zeros(2, 4, CHANNELS, dtype=torch.int64)}, "got torch.int64"),
        ({"image": [1.0]}, "got list"),
        ({"image": {"pixel_values": torch.zeros(1)}}, "has no encoder; pass features, or declare encoder="),
        ({"picture": torch.zeros(2, 4, CHANNELS)}, "unknown modality 'picture'"),
        (
            {
                "image": Features(
                    rows=torch.zeros(2, 4, CHANNELS),
                    pooled=torch.zeros(2, 1),
                    mask=torch.tensor([[True] * 4, [False] * 4]),
                )
            },
            "span 1 is all padding",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    model = build(with_image())
    ids = batch(model, torch.zeros(2, 4, CHANNELS))
    with pytest.raises(ValueError, match=message):
        model(ids, features=given)


def test_it_has_no_head_and_no_times():
    model = build(with_image())
    x = torch.zeros(2, 4, CHANNELS)
    ids = batch(model, x)
    with pytest.raises(InputError, match="'image', which is input only"):
        model(ids, features={"image": x}, targets={"image": x})
    with pytest.raises(ValueError, match="takes no timesteps"):
        model(ids, features={"image": x}, timesteps={"image": torch.zeros(8)})
    with pytest.raises(ConfigError, match="channels=encoder.hidden_size, got 0"):
        Connected.Config(name="image")
    with pytest.raises(ConfigError, match="trains an encoder and names none"):
        Connected.Config(name="image", channels=4, trains_encoder=True)
    with pytest.raises(ValueError, match="no placeholder_id"):
        Connected.Config(name="image", channels=4).build(hidden_size=8).span_ids(torch.zeros(1, 2, 4))


def test_cached_decoding_is_the_full_forward():
    model = build(with_image(MOT)).eval()
    x = torch.randn(2, 4, CHANNELS)
    ids = batch(model, x)
    told = model.generate(ids[:, :-2], features={"image": x}, max_new_tokens=5, do_sample=False, eos_token_id=None)
    wanted = ids[:, :-2]
    for _ in range(5):
        logits = model(wanted, features={"image": x}).logits[:, -1]
        logits[:, [PLACE, BEGIN]] = -torch.inf
        wanted = torch.cat((wanted, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(told, wanted)


def test_a_placeholder_is_never_sampled():
    model = build(with_image()).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every row alike, so that one in ten would open a picture
    x = torch.randn(1, 2, CHANNELS)
    ids = part_of(model).span_ids(x)[0].unsqueeze(0)
    told = model.generate(ids, features={"image": x}, max_new_tokens=200, do_sample=True, eos_token_id=None)
    assert not torch.isin(told[:, ids.shape[1] :], torch.tensor([PLACE, BEGIN])).any()
    assert told.shape[1] == 204


def test_flops_count_positions_and_connector():
    config = with_image()
    model = build(config)
    x = torch.randn(2, 4, CHANNELS)
    ids = batch(model, x)
    counted = flops(config, {"input_ids": ids, "features": {"image": x}})
    assert counted.tokens == ids.numel()
    without = flops(config, {"input_ids": ids})
    assert counted.total - without.total == 2 * 8 * CHANNELS * config.hidden_size


@pytest.fixture
def vision(tmp_path):
    """A tiny ViT as a user has one: saved in a folder."""
    folder = tmp_path / "vit"
    form = transformers.ViTConfig(
        hidden_size=CHANNELS,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    transformers.ViTModel(form).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return HFVision.Config(source=str(folder))


def pictures(count: int = 2) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), np.uint8))


def test_raw_pictures_through_a_frozen_encoder(vision, tmp_path):
    model = build(with_image(encoder=vision))
    encoder = load_encoder("hf_vision", source=vision.source)
    inputs, features = encoder.prepare(pictures()), encoder.encode(pictures())
    ids = batch(model, features)
    before = total_params(model.config)
    out = model(ids, features={"image": inputs}, labels=ids)
    torch.testing.assert_close(out.logits, model(ids, features={"image": features}).logits)
    out.loss.backward()
    assert part_of(model).get_encoder().is_frozen
    assert all(weight.grad is None for weight in part_of(model).get_encoder().parameters())
    # the encoder is beside the model: in neither its weights nor its files
    assert before == sum(weight.numel() for weight in model.parameters())
    assert not any("network" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert again.config.modalities == model.config.modalities
    assert torch.equal(
        again(ids, features={"image": inputs}).logits, model.eval()(ids, features={"image": inputs}).logits
    )


def test_a_frozen_encoder_moves_with_the_model(vision):
    model = build(with_image(encoder=vision))
    encoder = part_of(model).get_encoder()
    model.double()
    assert encoder.dtype == torch.float64
    inputs = encoder.prepare(pictures())
    assert model(batch(model, inputs), features={"image": inputs}).logits.dtype == torch.float64


def test_a_trained_encoder_is_part_of_the_model(vision, tmp_path):
    model = OmniMoeForCausalLM(with_image(encoder=vision, trains_encoder=True))
    published = load_encoder("hf_vision", source=vision.source)
    encoder = part_of(model).get_encoder()
    for name, weight in published.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], weight), name
    inputs = published.prepare(pictures())
    ids = batch(model, published.encode(pictures()))
    out = model(ids, features={"image": inputs}, labels=ids)
    out.loss.backward()
    # the published pooler is not used
    assert all(weight.grad.any() for name, weight in encoder.named_parameters() if "pooler" not in name)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.01)
    model.eval().save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids, features={"image": inputs}).logits, model(ids, features={"image": inputs}).logits)
    with torch.device("meta"):
        assert build(model.config).device.type == "meta"


def test_the_width_is_held_against_the_encoders(vision):
    model = build(with_image(encoder=vision, channels=7))
    with pytest.raises(ConfigError, match="has channels 7, and its encoder gives 12"):
        part_of(model).get_encoder()
    with pytest.raises(ConfigError, match="has channels 7, and its encoder gives 12"):
        build(with_image(encoder=vision, channels=7, trains_encoder=True))


def test_a_model_whose_encoder_is_missing_still_loads_and_takes_features(tmp_path):
    gone = HFVision.Config(source=str(tmp_path / "gone"))
    model = build(with_image(encoder=gone)).eval()
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    x = torch.randn(2, 4, CHANNELS)
    ids = batch(model, x)
    assert torch.equal(again(ids, features={"image": x}).logits, model(ids, features={"image": x}).logits)
    with pytest.raises(EncoderError, match="gone"):
        again(ids, features={"image": {"pixel_values": torch.zeros(2, 3, 32, 32)}})


def test_its_config_is_json(vision):
    config = with_image(encoder=vision, connector=Pool.Config(kind="shuffle", then=MLP.Config()), trains_encoder=True)
    plain = json.loads(json.dumps(config.modalities[1].to_dict()))
    assert plain["type"] == "connected"
    assert plain["encoder"]["type"] == "hf_vision"
    assert Modality.Config.from_dict(plain) == config.modalities[1]
