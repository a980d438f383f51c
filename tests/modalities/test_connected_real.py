"""Real pictures through a real encoder into a model that is trained here, and trained encoders saved and read back."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

from omnimoe import from_pretrained, load_encoder
from omnimoe.connectors import Pool
from omnimoe.encoders.efficientnet import WEIGHTS as EFFICIENTNET
from omnimoe.encoders.efficientnet import EfficientNetLite0
from omnimoe.encoders.whisper import WEIGHTS as WHISPER
from omnimoe.modalities import Connected
from omnimoe.model import OmniMoeForCausalLM
from tests.declarations import DENSE, TEXT

ROOT = Path(__file__).parents[2]
PICTURES = sorted((ROOT / "tests" / "fixtures" / "pictures").glob("*.png"))
has_efficientnet = pytest.mark.skipif(
    not EFFICIENTNET.is_installed() or importlib.util.find_spec("timm") is None,
    reason="no weights of EfficientNet-lite0",
)
has_whisper = pytest.mark.skipif(not WHISPER.is_installed(), reason="no weights of Whisper tiny.en")


@has_efficientnet
def test_a_model_learns_to_name_drawings_and_the_drawing_counts(capsys):
    main = runpy.run_path(str(ROOT / "examples" / "encoder_inputs.py"))["main"]
    own, other = main(24, 50)
    assert own < 0.75 * other, capsys.readouterr().out


def with_image(**fields) -> OmniMoeForCausalLM:
    image = Connected.Config(
        name="image",
        channels=1280,
        placeholder_id=9,
        connector=Pool.Config(),
        encoder=EfficientNetLite0.Config(),
        **fields,
    )
    torch.manual_seed(0)
    return OmniMoeForCausalLM(DENSE.replace(modalities=(TEXT, image)))


@has_efficientnet
def test_raw_pictures_and_features_are_the_same_to_a_model():
    model, encoder = with_image().eval(), load_encoder("efficientnet_lite0")
    inputs, features = encoder.prepare(PICTURES[:2]), encoder.encode(PICTURES[:2])
    ids = torch.stack(model.model.modalities["image"].span_ids(features))
    assert ids.shape == (2, 9)
    raw, given = (model(ids, features={"image": held}).logits for held in (inputs, features))
    torch.testing.assert_close(raw, given)


@has_efficientnet
def test_a_trained_encoder_keeps_its_published_weights_until_it_is_trained(tmp_path):
    model, encoder = with_image(trains_encoder=True), load_encoder("efficientnet_lite0")
    inside = model.model.modalities["image"].get_encoder()
    held = inside.state_dict()
    assert all(torch.equal(weight, held[name]) for name, weight in encoder.state_dict().items())
    inputs = encoder.prepare(PICTURES[:2])
    ids = torch.cat((torch.full((2, 9), 9), torch.tensor([[12, 13], [14, 15]])), dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(ids, features={"image": inputs}, labels=ids).loss.backward()
    optimizer.step()
    changed = [
        name for name, weight in encoder.state_dict().items() if not torch.equal(weight, inside.state_dict()[name])
    ]
    assert "network.conv_stem.weight" in changed
    assert "network.bn1.running_mean" in changed
    assert not any("classifier" in name for name in changed)
    model.eval().save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(ids, features={"image": inputs}).logits, model(ids, features={"image": inputs}).logits)


@has_whisper
def test_clips_of_different_lengths_become_spans_of_different_lengths():
    encoder = load_encoder("whisper_tiny", seconds=5)
    speech = Connected.Config(
        name="speech", channels=384, placeholder_id=9, connector=Pool.Config(axes=1, size=5), encoder=encoder.config
    )
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(DENSE.replace(modalities=(TEXT, speech))).eval()
    clips = [torch.sin(torch.arange(count) * 0.1) for count in (16_000, 8_000)]
    features = encoder.encode(clips)
    spans = model.model.modalities["speech"].span_ids(features)
    assert [len(span) for span in spans] == [10, 5]  # 50 rows a second, 5 to a window
    ids = torch.full((2, 12), 13)
    for row, span in enumerate(spans):
        ids[row, : len(span)] = span
    together = model(ids, features={"speech": features}).logits
    alone = model(ids[1:], features={"speech": encoder.encode(clips[1:])}).logits
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)
