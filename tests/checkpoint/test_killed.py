"""Saves that are killed, at every step there is: one model or the other loads, whole, and nothing is left about."""

from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import modeling_utils

from omnimoe import publish as publishing
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.publish import MANIFEST, SEALED, settle
from omnimoe.train.checkpoint import load_state, restore, save_checkpoint
from omnimoe.train.settings import TrainSettings
from tests.checkpoint.files import left_behind, load, same_weights
from tests.children import ChildError, in_child
from tests.refusals import refused, unchanged

CALLS = (
    *((os, name) for name in ("rename", "replace", "link", "fsync", "mkdir", "unlink", "rmdir")),
    *((io, "open"), (builtins, "open"), (modeling_utils, "safe_save_file")),
)
"""What a save changes files by."""
WRITES = ("open", "safe_save_file")
"""Those of them after which a file may be there in part."""


CHANGES = ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
"""What Python reports of calls that change files, whoever makes them."""


def count_calls(act: Callable[[int], None]) -> list[str]:
    """From here on calls ``act`` with a number before every call that changes files, and within those that write.

    Returns:
        What changes files elsewhere, which grows as it happens.
    """
    made, depth, missed = 0, 0, []

    def listen(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if not depth and (event in CHANGES or writes):
            missed.append(f"{event} {args[0]}")

    sys.addaudithook(listen)

    def step() -> None:
        nonlocal made
        made += 1
        act(made)

    def counted(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if name == "open" and not {*str(kwargs.get("mode", [*args, "", "r"][1]))} & {*"wax+"}:
                return real(*args, **kwargs)
            step()
            depth += 1
            try:
                return write(*args, **kwargs)
            finally:
                depth -= 1

        def write(*args: Any, **kwargs: Any) -> Any:
            done = real(*args, **kwargs)
            if name == "safe_save_file":
                whole = Path(args[1]).read_bytes()
                os.truncate(args[1], len(whole) // 2)
                step()
                Path(args[1]).write_bytes(whole)
            elif name == "open":
                step()
            return done

        return call

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name), name))
    return missed


def steps_of(save: Callable[[], object]) -> int:
    """How many steps a save has."""

    def count() -> int:
        seen = [0]
        missed = count_calls(lambda number: seen.__setitem__(0, number))
        save()
        assert missed == [], "not counted"
        return seen[0]

    return in_child(count)


def test_what_is_not_counted_is_found(newer, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "CALLS", tuple(call for call in CALLS if call != (os, "rename")))
    with pytest.raises(ChildError, match=r"not counted[^$]*os\.rename "):
        steps_of(lambda: newer.save_pretrained(tmp_path))


def killed_at(step: int, save: Callable[[], object]) -> None:
    """Runs a save in a child that is killed at a step, without a chance to tidy up."""

    def die() -> None:
        count_calls(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == step else None)
        save()

    killed(die)


def killed(act: Callable[[], object]) -> None:
    """Runs something in a child, which must be killed."""
    with pytest.raises(ChildError) as error:
        in_child(act)
    assert error.value.signal == signal.SIGKILL


PARTS = 6


@pytest.fixture(scope="module")
def steps(newer, tmp_path_factory) -> int:
    """How many steps a save in shards has over a model that is there."""
    folder = tmp_path_factory.mktemp("counted")
    newer.save_pretrained(folder)
    return steps_of(lambda: newer.save_pretrained(folder, max_shard_size="12KB"))


@pytest.mark.hazard(13)
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_every_step(saved, model, newer, steps, part):
    """The old model or the new one loads, whole, and the next save sweeps up."""
    user = saved / "notes.txt"
    user.write_text("mine")
    outcomes = []
    for step in range(1 + part, steps + 1, PARTS):
        if any(outcomes):
            model.save_pretrained(saved)
        with unchanged(newer):
            killed_at(step, lambda: newer.save_pretrained(saved, max_shard_size="12KB"))
        loaded = load(saved, verify=True)
        assert same_weights(loaded, model) or same_weights(loaded, newer), f"neither model at step {step}"
        assert user.read_text() == "mine"
        outcomes.append(same_weights(loaded, newer))
    assert outcomes, "there are more parts than steps"
    assert outcomes == sorted(outcomes), "once the new model is there, it stays"
    newer.save_pretrained(saved)
    assert left_behind(saved) == []
    assert same_weights(load(saved, verify=True), newer)


@pytest.mark.hazard(13)
def test_killed_at_every_step_of_a_first_save(newer, tmp_path):
    """There is no model then, or a whole one; a folder with half of one is never taken for a model."""
    steps = steps_of(lambda: newer.save_pretrained(tmp_path / "counted"))
    loads = []
    for step in range(1, steps + 1):
        folder = tmp_path / f"at-{step}"
        with unchanged(newer):
            killed_at(step, lambda folder=folder: newer.save_pretrained(folder))
        with refused(folder, str(folder), is_sure=False) as told:
            loaded = load(folder, verify=True)
        loads.append(not told.value and same_weights(loaded, newer))
        if not loads[-1]:
            assert not folder.exists() or all(name.startswith(".") for name in os.listdir(folder))
    assert not loads[0]
    assert loads[-1]
    assert loads == sorted(loads)


@pytest.mark.hazard(13)
def test_killed_again_at_every_step_of_the_load_that_ends_it(saved, newer, tmp_path):
    """A save was killed when its files were whole, and so is whoever moves them."""

    def die_sealed() -> None:
        publishing._move = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        newer.save_pretrained(saved, max_shard_size="12KB")

    killed(die_sealed)
    assert (saved / SEALED / MANIFEST).exists()
    whole = shutil.copytree(saved, tmp_path / "counted")
    steps = steps_of(lambda: settle(whole))
    assert steps > len(list(saved.glob(f"{SEALED}/*"))), "each file is moved"
    for step in range(1, steps + 1):
        folder = Path(shutil.copytree(saved, tmp_path / f"at-{step}"))
        killed_at(step, lambda folder=folder: settle(folder))
        with unchanged(newer):
            loaded = load(folder, verify=True)
        assert same_weights(loaded, newer)
        assert left_behind(folder) == []


@pytest.mark.hazard(13)
@pytest.mark.slow
def test_the_checkpoint_of_a_run_killed_at_every_step(model, newer, tmp_path):
    """Model, settings and state of one step, whenever it is killed."""
    settings = TrainSettings()

    def save(folder: Path, which: OmniMoeForCausalLM, step: int) -> None:
        save_checkpoint(folder, which, settings, {"step": step})

    save(tmp_path / "counted", newer, 2)
    steps = steps_of(lambda: save(tmp_path / "counted", newer, 2))
    folder = tmp_path / "checkpoint"
    for step in range(1, steps + 1):
        save(folder, model, 1)
        with unchanged(newer):
            killed_at(step, lambda: save(folder, newer, 2))
        assert restore(folder)
        saved_step = load_state(folder)["step"]
        assert same_weights(load(folder, verify=True), newer if saved_step == 2 else model)
