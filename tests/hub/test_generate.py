"""``omnimoe generate`` with an id: what the model cannot do is told before its weights are fetched."""

from __future__ import annotations

import pytest

from omnimoe.cli import main

NAME = "org/tiny"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--to", "sculpture"], "'sculpture'"),
        (["--from", "smell", "roses", "--to", "text"], "'smell'"),
        (["--to", "text", "--steps", "5"], "--steps is for what is denoised"),
    ],
)
def test_a_wrong_call_fetches_no_weights(hub, saved, capsys, asked, message):
    hub.add(NAME, saved)
    assert main(["generate", "--model", NAME, *asked]) != 0
    assert message in capsys.readouterr().err
    assert "config.json" in hub.fetched()
    assert not any(file.endswith(".safetensors") for file in hub.fetched())
