"""The code of the page on encoders runs, with an encoder that needs nothing installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from omnimoe.encoders import ENCODERS, Encoder, Features, register_encoder

PAGE = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")


@pytest.fixture
def adding():
    """The encoder that the page adds."""
    block = next(found for found in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "@register" in found)
    names = {"register_encoder": register_encoder, "Encoder": Encoder, "Features": Features, "nn": nn, "torch": torch}
    exec(compile(block, "docs/encoders.md", "exec"), names)  # noqa: S102 - our own page
    yield names["MeanColour"]
    ENCODERS.remove("mean_colour")


def test_an_encoder_is_added_and_connected(adding):
    block = next(found for found in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "Connected" in found)
    encoder = adding.Config().build()
    features = encoder.encode([torch.full((4, 4, 3), shade) for shade in (0, 255)])
    assert features.pooled.tolist() == [[0.0] * 3, [1.0] * 3]
    input_ids = torch.tensor([[3, 15, 4, 100, 101], [3, 15, 4, 102, 103]])
    names = {"encoder": encoder, "features": features, "input_ids": input_ids, "prompt": input_ids[:, :3]}
    exec(compile(block, "docs/encoders.md", "exec"), names)  # noqa: S102 - our own page
    assert [span.tolist() for span in names["spans"]] == [[3, 15, 4]] * 2
    assert int(names["out"].counts["text"]) == 6


def test_the_page_names_every_encoder_and_connector():
    from omnimoe.connectors import CONNECTORS

    for name in [*ENCODERS.names(), *CONNECTORS.names()]:
        assert f"`{name}`" in PAGE, name
