"""``omnimoe demo``: what is wrong is told before a page is built."""

from __future__ import annotations

import sys

import pytest

from omnimoe import cli
from tests.narrow import narrow_model


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "mot_7b"], "no weights for 'mot_7b'; train it first"),
        (["--model", "mot_7b", "--port", "99999"], "--port must lie in 1 to 65535, got 99999"),
        (["--model", "mot_nanno"], "mot_nano"),
        (["--model", "mot_7b", "--tokenizer", "image"], "there are no weights"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, told):
    assert cli.main(["demo", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert told in complaint
    assert complaint.count("\n") == 1


def test_without_gradio_the_extra_is_named(capsys, tmp_path, monkeypatch):
    narrow_model().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", "--model", str(tmp_path)]) == 1
    assert "install it with pip install 'omnimoe[demo]'" in capsys.readouterr().err
