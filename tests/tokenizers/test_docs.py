"""docs/tokenizers.md: its table names every tokenizer, and its code that needs no files runs."""

from __future__ import annotations

import re
from pathlib import Path

from omnimoe.tokenizers import TOKENIZERS, load_tokenizer
from omnimoe.tokenizers.codec import WEIGHTS, CodecTokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "tokenizers.md").read_text(encoding="utf-8")


def block(heading: str) -> str:
    """The first block of Python after a heading."""
    found = re.search(r"```python\n(.*?)```", PAGE.partition(f"## {heading}\n")[2], re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_table_names_every_tokenizer_once():
    table = PAGE[PAGE.index("| name |") : PAGE.index("A picture is a path")]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    ours = [name for name in TOKENIZERS.names() if TOKENIZERS.get(name).__module__.startswith("omnimoe.")]
    assert sorted(rows) == ours


def test_the_table_says_the_sizes_of_what_ships():
    for name in ("text", "bytes", "picture", "speech"):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"{load_tokenizer(name).vocab_size:,}" in row


def test_the_table_says_what_ships():
    found = {}
    for name in TOKENIZERS.names():
        kind = TOKENIZERS.get(name)
        row = next((line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")), None)
        if row is not None and issubclass(kind, CodecTokenizer):
            found[name] = row.split(" | ")[5]
            assert (found[name] == "ships") == (WEIGHTS / kind.shipped).is_file()
    assert list(found) == ["picture", "picture_128", "picture_latents", "speech"]


def test_a_tokenizer_of_ones_own():
    try:
        exec(block("Bring another"), {"__name__": "own"})  # noqa: S102 - our own page
        tokenizer = load_tokenizer("latin1")
        assert tokenizer.decode(tokenizer("déjà vu").ids) == "déjà vu"
    finally:
        TOKENIZERS.remove("latin1")


def test_what_a_call_gives():
    names = {"load_tokenizer": load_tokenizer}
    exec(block("One interface"), names)  # noqa: S102 - our own page
    span = names["span"]
    assert (len(span), span.modality, span.markers, span.rows) == (6, "text", None, None)
    assert span.positions.shape == (6, 3)
