"""ONE-PEACE against a loop over published names, and its files to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import omnimoe
from omnimoe.checkpoint import CheckpointError
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.convert import find_converter, to_omnimoe, to_published
from omnimoe.zoo.one_peace import published
from omnimoe.zoo.one_peace.convert import KEPT, ONE_PEACE
from tests.zoo.hollow import loads_and_saves
from tests.zoo.one_peace.oracle import TINY, published_list, rows_of, vector
from tests.zoo.weights import close, gradients_of, published_of, random_model, write_folder

CLS, PICTURE, SOUND = 60, 57, 58
SAMPLES = (900, 500, 240)


@pytest.fixture(scope="module")
def model():
    return random_model(ONE_PEACE, TINY)


@pytest.fixture(scope="module")
def weights(model):
    return published_of(ONE_PEACE, model)


@pytest.fixture(scope="module")
def doubles(weights):
    return {name: held.double() for name, held in weights.items()}


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("published"), {**TINY, "heads": []}, weights)


def inputs(model, which: str, *, left: bool = False) -> tuple[dict, list[list]]:
    """A batch for ours, with texts and sounds of several lengths, padded on a side; and the spans of each sequence."""
    made = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=made)
    texts = [torch.randint(3, 50, (length,), generator=made).tolist() for length in (11, 4, 1)]
    waves = torch.randn(3, max(SAMPLES), generator=made)
    features: dict = {}
    if "image" in which:
        features["vision"] = {"pixels": pixels}
    if "audio" in which:
        for row, length in enumerate(SAMPLES):
            waves[row, length:] = 0
        features["audio"] = {"waves": waves, "lengths": torch.tensor(SAMPLES)}
    spans = {name: model.model.modalities[name].span_ids(given) for name, given in features.items()}
    rows, parts = [], []
    for row in range(3):
        ids = [torch.tensor([CLS, *texts[row]])] if "text" in which else []
        given: list = [("text", texts[row])] if ids else []
        if "image" in which:
            ids.append(spans["vision"][row])
            given.append(("image", pixels[row].double()))
        if "audio" in which:
            ids.append(spans["audio"][row])
            given.append(("audio", waves[row, : SAMPLES[row]].double()))
        rows.append(torch.cat(ids))
        parts.append(given)
    side = "left" if left else "right"
    padded = pad_sequence(rows, batch_first=True, padding_value=1, padding_side=side)
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True, padding_side=side)
    batch = {"input_ids": padded, "attention_mask": mask, "features": features}
    return (batch if features else {name: batch[name] for name in ("input_ids", "attention_mask")}), parts


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("which", ["text", "image", "audio", "text image", "text audio", "text image audio"])
def test_rows(model, doubles, which, left):
    batch, parts = inputs(model, which, left=left)
    with torch.no_grad():
        found = model.model(**batch).last_hidden_state
    for row, given in enumerate(parts):
        close(found[row][batch["attention_mask"][row].bool()], rows_of(doubles, given))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("which", ["text", "image", "audio", "text image", "text audio", "text image audio"])
def test_gradients(model, weights, which, left):
    """Of every published tensor, on padded batches, with one or two modalities absent and none."""
    batch, parts = inputs(model, which, left=left)
    real = batch["attention_mask"].bool()
    factors = torch.randn(*real.shape, 32, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    idle = 0 * (model.aligned.logit_scale + model.aligned.weight.sum() + model.aligned.bias.sum())
    ((model.model(**batch).last_hidden_state * factors)[real].sum() + idle).backward()
    leaves = {name: held.double().requires_grad_() for name, held in weights.items()}
    sum((rows_of(leaves, given) * factors[row][real[row]]).sum() for row, given in enumerate(parts)).backward()
    for name, found in gradients_of(ONE_PEACE, model).items():
        wanted = leaves[name].grad
        if wanted is None or not wanted.any():
            assert not found.any(), name
        else:
            close(found, wanted)


def test_vectors(model, doubles):
    batch, parts = inputs(model, "text image audio")
    (ids, mask), features = (
        (inputs(model, "text")[0][name] for name in ("input_ids", "attention_mask")),
        batch["features"],
    )
    with torch.no_grad():
        found = {
            "text": model.align("text", ids, attention_mask=mask),
            "image": model.align("vision", features["vision"]),
            "audio": model.align("audio", features["audio"]),
        }
    for row, given in enumerate(parts):
        for kind, held in given:
            close(found[kind][row], vector(doubles, kind, held))


def test_from_raw_inputs_to_vectors(model):
    """As docs/earlier.md has it, in half precision too."""
    parts = model.model.modalities
    seen = parts["vision"].get_encoder().prepare([np.full((20, 30, 3), 99, dtype=np.uint8)])
    made = np.random.default_rng(0)
    heard = parts["audio"].get_encoder().prepare([made.uniform(-1, 1, n).astype(np.float32) for n in (300, 9000)])
    assert heard["lengths"].tolist() == [16_000, 16_000]
    heard = {"waves": heard["waves"][:, :2000], "lengths": torch.tensor([2000, 1000])}
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        for name, given in (("vision", seen), ("audio", heard)):
            whole, rounded = model.align(name, given), half.align(name, given)
            torch.testing.assert_close(whole.norm(dim=-1), torch.ones(len(whole)))
            assert float((whole * rounded.float()).sum(-1).min()) > 0.98


def test_a_folder_to_the_bit(weights, model, folder, tmp_path):
    assert find_converter(folder) is ONE_PEACE
    read = omnimoe.from_pretrained(folder)
    assert read.config.published["files"]["config.json"]["heads"] == ["aligned"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    to_omnimoe(folder, tmp_path / "ours", ONE_PEACE, max_shard_size="40KB")
    to_published(tmp_path / "ours", tmp_path / "theirs")
    back = load_file(tmp_path / "theirs" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_a_checkpoint_of_two_branches_and_what_goes_along(weights, doubles, tmp_path):
    plain = published(32, 48, 2, 4, branches=("text", "image"), image_size=32, vocab_size=60)
    plain["encoder"]["text_adapter"] = TINY["encoder"]["text_adapter"]
    kept = {name: held for name, held in weights.items() if "audio" not in name}
    rest = {"encoder_wrapper.text_adapter.rp_bucket": torch.arange(4), "decoder_text_embed.bias": torch.randn(8)}
    read = omnimoe.from_pretrained(write_folder(tmp_path / "theirs", plain, kept | rest))
    assert read.config.modality_names == ("text", "vision")
    batch, parts = inputs(read, "text image")
    with torch.no_grad():
        close(read.model(**batch).last_hidden_state[0], rows_of(doubles, parts[0]))
    to_omnimoe(tmp_path / "theirs", tmp_path / "ours", ONE_PEACE)
    along = load_file(tmp_path / "ours" / KEPT)
    assert along.keys() == rest.keys()
    assert all(torch.equal(held, rest[name]) for name, held in along.items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder_wrapper.fusion_model.layers.1.audio_ffn.0.wi_1.weight": None}, "layers.1.audio_ffn.0.wi_1.weight"),
        ({"encoder_wrapper.fusion_model.layers.2.gamma_1": torch.zeros(32)}, "layers.2.gamma_1"),
        ({"encoder_wrapper.image_adapter.pos_embed": torch.zeros(10, 32)}, "image_adapter.pos_embed"),
        ({"encoder_wrapper.text_adapter.rel_pos_table_list.1.weight": torch.zeros(18, 4)}, "rel_pos_table_list.1"),
    ],
    ids=["missing", "extra", "another picture size", "tables by layer"],
)
def test_what_does_not_fit_is_named(weights, tmp_path, change, told):
    held = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    with pytest.raises(MisfitError, match=told):
        omnimoe.from_pretrained(write_folder(tmp_path, TINY, held))


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("", {"scale_heads": True}, "scale_heads of encoder is True"),
        ("text_adapter", {"layernorm_embedding": True}, "layernorm_embedding of text_adapter is True"),
        ("audio_adapter", {"abs_pos_type": "fixed"}, "abs_pos_type of audio_adapter is 'fixed'"),
        ("audio_adapter", {"feature_encoder_spec": "[]"}, "feature_encoder_spec"),
        ("image_adapter", {"rel_bucket_size": 3}, "rel_bucket_size of image_adapter is 3"),
        ("", {"layers": None}, "malformed|does not fit"),
    ],
)
def test_what_is_not_converted_is_refused(part, change, told):
    encoder = TINY["encoder"]
    changed = {**encoder, part: {**encoder[part], **change}} if part else {**encoder, **change}
    with pytest.raises(CheckpointError, match=told):
        ONE_PEACE.config_of({**TINY, "encoder": changed})


def test_a_setting_left_out_has_the_default_of_the_authors():
    encoder = {name: value for name, value in TINY["encoder"].items() if name != "magneto_scale_attn"}
    with pytest.raises(CheckpointError, match="magneto_scale_attn of encoder is False"):
        ONE_PEACE.config_of({**TINY, "encoder": encoder})


def test_published_list_at_full_size(tmp_path):
    """The names of the authors' code at their settings, 4B in all and 1.5B of the branch for pictures."""
    model = omnimoe.load("one_peace_4b", device="meta")
    found = ONE_PEACE.plan(model).published
    assert found == published_list()
    loads_and_saves("one_peace_4b", found, tmp_path)
    count = sum(torch.Size(shape).numel() for shape in found.values())
    pictures = sum(
        torch.Size(shape).numel() for name, shape in found.items() if "text" not in name and "audio" not in name
    )
    assert abs(count / 1e9 - 4) < 0.2
    assert abs(pictures / 1e9 - 1.5) < 0.05
