"""The page for users: its code runs, its messages are those that are raised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omnimoe.model_card import FACTS

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"


def test_code_runs_from_top_to_bottom(hub, monkeypatch, tmp_path):
    hub.tokens["writer"] = {"write"}
    monkeypatch.setenv("HF_TOKEN", "writer")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        if "MyExperts" not in block:
            exec(compile(block, PAGE.name, "exec"), names)  # noqa: S102 - our own page
    assert hub.repositories["org/name"].is_private
    assert set(hub.repositories["org/name"].branches) == {"main", "next"}
    assert names["model_without_pictures"].config.modality_names == ("text", "speech")


@pytest.mark.parametrize("field", FACTS)
def test_every_field_of_the_card_is_named(field):
    assert f"`{field}`" in PAGE.read_text(encoding="utf-8")


def test_messages_are_those_that_are_raised():
    sources = "".join(path.read_text(encoding="utf-8") for path in (PAGE.parents[1] / "omnimoe").rglob("*.py"))
    # where a sentence goes on in the next line of code, quotes stand between
    known = re.sub(r'"\s+f?"', "", sources)
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| .* \| `", line)]
    messages = [message for line in table for message in re.findall(r"`([^`]+)`", line.split(" | ")[1])]
    pieces = {piece.strip(" ,.") for message in messages for piece in re.split(r"'[^']*'|<.*?>|[.]{3}|[;:?]", message)}
    assert len(pieces) > 15
    assert sorted(piece for piece in pieces if piece not in known and piece != "It has main, v1.1") == []
