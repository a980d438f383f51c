"""Progress bars: on a terminal, not in a log, and as the variable of huggingface_hub says where it is set."""

from __future__ import annotations

import io

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

from omnimoe import from_pretrained
from omnimoe.bars import bars_where_seen


class Terminal(io.StringIO):
    """A stream that says what it is."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.is_terminal


@pytest.mark.parametrize(("is_terminal", "is_drawn"), [(True, True), (False, False)])
def test_where_they_are_drawn(hub, sharded, monkeypatch, is_terminal, is_drawn):
    hub.add("org/tiny", sharded)
    monkeypatch.setattr("sys.stderr", stream := Terminal(is_terminal))
    model = from_pretrained("org/tiny")
    model.save_pretrained(sharded.parent / f"again-{is_terminal}")
    assert ("it/s" in stream.getvalue()) == is_drawn, stream.getvalue()
    assert logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()


@pytest.mark.parametrize("given", [True, False])
def test_a_variable_that_is_set_decides(monkeypatch, given):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", given)
    monkeypatch.setattr("sys.stderr", Terminal(False))
    before = logging.is_progress_bar_enabled()
    with bars_where_seen():
        assert logging.is_progress_bar_enabled() == before


def test_bars_that_are_off_stay_off(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal(False))
    logging.disable_progress_bar()
    try:
        with bars_where_seen():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
    with pytest.raises(RuntimeError), bars_where_seen():
        raise RuntimeError
    assert logging.is_progress_bar_enabled()
