"""What every refusal is held to fails where there is none, in other words, or where something changed."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from omnimoe import CheckpointError
from omnimoe.registry import Registry
from omnimoe.routers import base
from tests.refusals import Refusal, differences, refused, state_of, unchanged


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder from which code can be imported, with a file, a link and a folder in it."""
    (tmp_path / "held" / "sub").mkdir(parents=True)
    (tmp_path / "held" / "a.txt").write_text("a")
    (tmp_path / "held" / "canary_of_refusals.py").write_text("")
    (tmp_path / "held" / "link").symlink_to("a.txt")
    return tmp_path / "held"


@pytest.fixture
def model():
    held = nn.Linear(2, 2)
    held.weight.grad = torch.zeros(2, 2)
    return held


@pytest.fixture
def table():
    shapes: Registry[type] = Registry("shape")
    shapes.register("circle")(int)
    return shapes


def imported(folder):
    sys.path.insert(0, str(folder))
    try:
        __import__("canary_of_refusals")
    finally:
        sys.path.remove(str(folder))


CHANGES = {
    "a file": (lambda folder, *_: (folder / "a.txt").write_text("b"), "a.txt was"),
    "a new file": (lambda folder, *_: (folder / "b.txt").write_text("b"), "b.txt is new"),
    "a file that is gone": (lambda folder, *_: (folder / "a.txt").unlink(), "a.txt is gone"),
    "a new folder": (lambda folder, *_: (folder / "new").mkdir(), "new is new"),
    "another link": (lambda folder, *_: (folder / "link").rename(folder / "other"), "other is new"),
    "what a file may": (lambda folder, *_: (folder / "a.txt").chmod(0o600), "a.txt was"),
    "a pipe": (lambda folder, *_: os.mkfifo(folder / "pipe"), "pipe is new"),
    "all of it": (lambda folder, *_: folder.rename(folder.parent / "other"), "is gone"),
    "a weight": (lambda folder, model, table: nn.init.zeros_(model.weight), "weights / weight was"),
    "a gradient": (lambda folder, model, table: model.weight.grad.add_(1), "gradients / weight was"),
    "no gradient": (lambda folder, model, table: model.zero_grad(), "gradients / weight was"),
    "its mode": (lambda folder, model, table: model.eval(), "is training"),
    "a name": (lambda folder, model, table: table.register("square")(float), "square is new"),
    "another part": (lambda folder, model, table: table.register("circle", exist_ok=True)(float), "circle was"),
    "a router": (lambda *_: base.ROUTERS._parts.update(of_refusals=int), "registry of router / of_refusals is new"),
    "torch": (lambda *_: torch.rand(1), "random numbers of torch"),
    "numpy": (lambda *_: np.random.rand(), "random numbers of NumPy"),
    "random": (lambda *_: random.random(), "random numbers of Python"),
    "environment": (lambda *_: os.environ.update(OF_REFUSALS="1"), "the environment / OF_REFUSALS is new"),
    "current folder": (lambda folder, *_: os.chdir(folder), "the current folder was"),
    "sys.path": (lambda folder, *_: sys.path.append(str(folder)), "sys.path was"),
    "dtype": (lambda *_: torch.set_default_dtype(torch.float64), "torch's defaults was"),
    "gradients": (lambda *_: torch.set_grad_enabled(False), "whether gradients are taken was"),
    "code": (lambda folder, *_: imported(folder), "the module canary_of_refusals was imported from"),
}


@pytest.fixture
def _as_before(monkeypatch):
    """What the changes change of this process."""
    monkeypatch.setattr(base.ROUTERS, "_parts", dict(base.ROUTERS._parts))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    here = os.getcwd()
    yield
    os.chdir(here)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    sys.modules.pop("canary_of_refusals", None)


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("kind", CHANGES)
def test_what_changed_is_seen_and_named(folder, model, table, kind):
    change, told = CHANGES[kind]

    def act() -> None:
        with refused((folder, model, table), "no"):
            change(folder, model, table)
            raise CheckpointError("no")

    with pytest.raises(AssertionError) as caught:
        act()
    assert told in str(caught.value)


@pytest.mark.usefixtures("_as_before")
def test_what_goes_through_is_held_to_the_same(folder, model):
    with pytest.raises(AssertionError, match=r"a\.txt was"), unchanged(folder, model):
        (folder / "a.txt").write_text("b")
    with unchanged(folder, model):
        assert model.weight.shape == (2, 2)


def test_code_from_nowhere_that_is_handed_in(folder, monkeypatch):
    with pytest.raises(AssertionError, match="canary_of_refusals was imported"), unchanged([1]):
        imported(folder)
    sys.modules.pop("canary_of_refusals", None)


def test_no_refusal_another_type_and_other_words():
    with (
        pytest.raises(AssertionError, match="nothing was refused; CheckpointError was to say 'no'"),
        refused([1], "no"),
    ):
        pass
    with pytest.raises(KeyError), refused([1], "no"):
        raise KeyError("no")
    with pytest.raises(AssertionError), refused([1], "no"):
        raise CheckpointError("yes")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (((), "no"), "hand in what could have been harmed"),
        ((([], None, ("a", 1), {}), "no"), "hand in what could have been harmed"),
        (([1], ""), "held to words"),
        (([1], " \n"), "held to words"),
        (([1], "no", Exception), "held to a type"),
        (([1], "no", BaseException), "held to a type"),
        (([1], "no", (CheckpointError, Exception)), "held to a type"),
    ],
    ids=str,
)
def test_a_case_that_would_hold_whatever_happened(given, told):
    with pytest.raises(AssertionError, match=told), refused(*given):
        raise CheckpointError("no")
    if len(given) == 2 and given[1] == "no":
        with pytest.raises(AssertionError, match=told), unchanged(*given[:1]):
            pass


def test_what_may_go_through(folder):
    for error in (None, CheckpointError("no")):
        with refused(folder, "no", is_sure=False) as told:
            if error:
                raise error
        assert told.value is error
    with refused(folder, "no", is_sure=False):
        (folder / "a.txt").write_text("b")


def test_states():
    nan = torch.tensor([float("nan"), 1.0])
    assert state_of(nan) == state_of(nan.clone())
    assert state_of(torch.zeros(2)) != state_of(-torch.zeros(2))
    assert state_of(torch.zeros(2)) != state_of(torch.zeros(2, 1))
    held = [1]
    before = state_of(lambda: {"a": held, "b": None})
    held.append(2)
    assert list(differences(before, state_of(lambda: {"a": held, "b": None}))) == ["a / 1 is new"]
    with pytest.raises(TypeError, match="nobody knows what a object holds"):
        state_of(object())
    assert str(Refusal()) == ""
