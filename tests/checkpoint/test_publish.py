"""Saves that are interrupted, killed or out of space: what was there still loads, and nothing is left lying about."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import modeling_utils

from omnimoe import from_pretrained
from omnimoe import publish as publishing
from omnimoe.experts import FeedForward
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.publish import MANIFEST, SEALED, publish, read_manifest, settle
from omnimoe.train.checkpoint import load_state, restore, save_checkpoint
from omnimoe.train.settings import TrainSettings
from tests.checkpoint.files import INDEX, WEIGHTS, ChildError, contents, in_child, load, refused, same_weights, small
from tests.declarations import build

CALLS = (
    *((os, name) for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")),
    *((io, "open"), (builtins, "open"), (modeling_utils, "safe_save_file")),
)


@pytest.fixture(scope="module")
def newer() -> OmniMoeForCausalLM:
    return build(small(), seed=7)


def count_calls(act: Callable[[int, str], None]) -> None:
    """From here on calls ``act`` with the number and the name of every call that changes files, before it is made."""
    made = 0
    for owner, name in CALLS:
        real = getattr(owner, name)

        def counted(*args, _real=real, _name=name, **kwargs):
            nonlocal made
            if _name != "open" or {*str(kwargs.get("mode", [*args, "", "r"][1]))} & {*"wax+"}:
                made += 1
                act(made, _name)
            return _real(*args, **kwargs)

        setattr(owner, name, counted)


def steps_of(save: Callable[[], object]) -> int:
    """How many calls a save makes."""

    def count() -> int:
        seen = [0]
        count_calls(lambda number, _: seen.__setitem__(0, number))
        save()
        return seen[0]

    return in_child(count)


def killed_at(step: int, save: Callable[[], object]) -> None:
    """Runs a save in a child that is killed before its ``step``-th call, without a chance to tidy up."""

    def die() -> None:
        count_calls(lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == step else None)
        save()

    with pytest.raises(ChildError) as error:
        in_child(die)
    assert error.value.signal == signal.SIGKILL


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


PARTS = 6


@pytest.fixture(scope="module")
def steps(newer, tmp_path_factory) -> int:
    """How many calls a save in shards makes over a model that is there."""
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
def test_killed_at_a_first_save(newer, tmp_path):
    """There is no model then, or a whole one; a folder with half of one is never taken for a model."""
    steps = steps_of(lambda: newer.save_pretrained(tmp_path / "counted"))
    loads = []
    for step in range(1, steps + 1, 5):
        folder = tmp_path / f"at-{step}"
        killed_at(step, lambda folder=folder: newer.save_pretrained(folder))
        try:
            loads.append(same_weights(load(folder), newer))
        except (OSError, ValueError):
            loads.append(False)
    assert not loads[0]
    assert loads == sorted(loads)


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
        killed_at(step, lambda: save(folder, newer, 2))
        assert restore(folder)
        saved_step = load_state(folder)["step"]
        assert same_weights(load(folder, verify=True), newer if saved_step == 2 else model)


@pytest.mark.hazard(13)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of luck"), OSError(errno.EIO, "broken disk")])
def test_an_error_in_the_middle_of_a_save(saved, model, newer, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    before = contents(saved)
    monkeypatch.setattr(modeling_utils, "safe_save_file", fail)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        newer.save_pretrained(saved)
    monkeypatch.undo()
    assert contents(saved) == before
    assert left_behind(saved) == []
    assert same_weights(load(saved, verify=True), model)


@pytest.mark.hazard(13)
def test_a_folder_that_a_failed_save_made_is_gone(newer, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_utils, "safe_save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        newer.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.hazard(13)
def test_saving_over_the_file_that_is_being_read(saved, newer):
    """The weights of the loaded model may still lie in the file: it is replaced, not written into."""
    loaded = load(saved)
    with torch.no_grad():
        loaded.lm_head.weight.add_(1)
    loaded.save_pretrained(saved)
    assert same_weights(load(saved, verify=True), loaded)


class TestPublish:
    def test_files_take_their_places_and_are_listed(self, tmp_path):
        folder = tmp_path / "a" / "b"
        with publish(folder) as fresh:
            (fresh / "x.txt").write_text("x")
            (fresh / "sub").mkdir()
            (fresh / "sub" / "y.txt").write_text("y")
            assert not (folder / "x.txt").exists()
        assert set(contents(folder)) == {"x.txt", "sub/y.txt", MANIFEST}
        assert read_manifest(folder)["x.txt"]["size"] == 1
        assert set(read_manifest(folder)) == {"x.txt", "sub/y.txt"}

    def test_what_the_user_keeps_there_stays(self, tmp_path):
        (tmp_path / "logs").mkdir()
        for name in ("notes.txt", "logs/run", "other.safetensors"):
            (tmp_path / name).write_text("mine")
        for text in ("one", "two"):
            with publish(tmp_path) as fresh:
                (fresh / "model.safetensors").write_text(text)
        assert (tmp_path / "model.safetensors").read_text() == "two"
        assert {path.read_text() for path in (tmp_path / "notes.txt", tmp_path / "logs" / "run")} == {"mine"}
        assert set(read_manifest(tmp_path)) == {"model.safetensors"}

    def test_a_save_in_shards_replaces_one_in_a_file_and_back(self, saved, model):
        """transformers leaves the other one there, and reads the old file next time."""
        for size, files in (("12KB", 6), ("1GB", 1), ("20KB", 4)):
            model.save_pretrained(saved, max_shard_size=size)
            assert len(list(saved.glob("*.safetensors"))) == files
            assert (saved / INDEX).exists() == (files > 1)
            assert same_weights(load(saved, verify=True), model)

    def test_a_save_of_something_else_keeps_what_an_earlier_one_wrote(self, saved, model):
        with publish(saved) as fresh:
            (fresh / "adapter_model.safetensors").write_bytes(b"adapters")
        assert (saved / WEIGHTS).exists()
        assert set(read_manifest(saved)) >= {WEIGHTS, "config.json", "adapter_model.safetensors"}

    def test_files_that_go_unless_they_are_written_again(self, tmp_path):
        for names in (("state", "model"), ("model",)):
            with publish(tmp_path, replaces=["state"]) as fresh:
                for name in names:
                    (fresh / name).write_text(name)
            assert (tmp_path / "state").exists() == ("state" in names)

    def test_the_current_folder_a_link_and_a_relative_path(self, model, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        monkeypatch.chdir(tmp_path / "real")
        for name in (".", tmp_path / "link", "../real", "new"):
            model.save_pretrained(name)
            assert same_weights(load(Path(name), verify=True), model)
        assert (tmp_path / "link").is_symlink()
        assert Path.cwd() == tmp_path / "real"

    def test_a_file_is_no_folder(self, model, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
            model.save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_save_that_runs_is_not_swept_away(self, tmp_path):
        with publish(tmp_path) as outer:
            (outer / "a").write_text("a")
            with publish(tmp_path) as inner:
                (inner / "b").write_text("b")
        assert set(read_manifest(tmp_path)) == {"a", "b"}
        assert left_behind(tmp_path) == []

    def test_other_ranks_write_nothing(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model", is_main_process=False)
        assert list(tmp_path.iterdir()) == []

    def test_a_seal_from_somebody_else_moves_nothing_out_of_the_folder(self, tmp_path):
        folder, outside = tmp_path / "model", tmp_path / "outside"
        (folder / SEALED / "sub").mkdir(parents=True)
        outside.mkdir()
        (outside / "keys").write_text("mine")
        (folder / "sub").symlink_to(outside)
        (folder / SEALED / "sub" / "keys").write_text("evil")
        (folder / SEALED / MANIFEST).write_text(json.dumps({"files": {}}))
        (folder / MANIFEST).write_text(
            json.dumps(
                {"files": {"../outside/keys": {"size": 4, "sha256": "0"}, "sub/keys": {"size": 4, "sha256": ""}}}
            )
        )
        with pytest.raises(PermissionError, match="leads out of"):
            settle(folder)
        assert (outside / "keys").read_text() == "mine"
        (folder / SEALED / "sub" / "keys").unlink()
        settle(folder)
        assert (outside / "keys").read_text() == "mine"

    def test_a_seal_that_is_a_link_is_no_seal(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / MANIFEST).write_text(json.dumps({"files": {}}))
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / SEALED).symlink_to(tmp_path / "mine")
        settle(tmp_path / "model")
        assert (tmp_path / "mine" / MANIFEST).exists()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """16 MB that can be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def heavy() -> OmniMoeForCausalLM:
    """A model of 4.5 MB, so that four do not fit."""
    return build(
        small("dense", hidden_size=128, experts=FeedForward.Config(intermediate_size=1024), initializer_range=0.02)
    )


def fill(disk: Path, *, leave: int) -> None:
    """Takes the disk but for ``leave`` bytes."""
    held = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(held.f_bavail * held.f_bsize - leave))


@pytest.mark.hazard(14)
class TestDiskFull:
    def check_old_one(self, folder: Path, old: OmniMoeForCausalLM, before: dict[str, str]) -> None:
        assert contents(folder) == before
        assert left_behind(folder) == []
        assert same_weights(load(folder, verify=True), old)

    @pytest.mark.parametrize("shards", ["1GB", "1MB"])
    def test_free_space_is_asked_for_first(self, small_disk, heavy, shards, monkeypatch):
        folder = small_disk / "model"
        heavy.save_pretrained(folder, max_shard_size=shards)
        before = contents(folder)
        fill(small_disk, leave=2 << 20)
        monkeypatch.setattr(publishing.tempfile, "mkdtemp", lambda **_: pytest.fail("something was written"))
        with pytest.raises(OSError, match="nothing was written, free some space") as error:
            heavy.save_pretrained(folder, max_shard_size=shards)
        assert error.value.errno == errno.ENOSPC
        self.check_old_one(folder, heavy, before)

    @pytest.mark.parametrize("shards", ["1GB", "1MB"])
    @pytest.mark.parametrize("leave", [1 << 20, 200_000])
    def test_it_fills_up_while_the_weights_are_written(self, small_disk, heavy, shards, leave, monkeypatch):
        folder = small_disk / "model"
        heavy.save_pretrained(folder, max_shard_size=shards)
        before = contents(folder)
        fill(small_disk, leave=leave)
        monkeypatch.setattr(OmniMoeForCausalLM, "_bytes_to_save", lambda *_: 0)
        with pytest.raises(OSError, match="no space left on the disk of .*; what it held is unchanged") as error:
            heavy.save_pretrained(folder, max_shard_size=shards)
        assert error.value.errno == errno.ENOSPC
        self.check_old_one(folder, heavy, before)

    def test_the_state_of_a_run(self, small_disk, model):
        folder = small_disk / "checkpoint"
        save_checkpoint(folder, model, TrainSettings(), {"step": 1})
        before = contents(folder)
        fill(small_disk, leave=1 << 20)
        with pytest.raises(OSError, match="no space left") as error:
            save_checkpoint(folder, model, TrainSettings(), {"step": 2, "moments": torch.ones(1 << 20)})
        assert error.value.errno == errno.ENOSPC
        self.check_old_one(folder, model, before)
        assert load_state(folder) == {"step": 1}

    def test_a_first_save_leaves_no_folder(self, small_disk, heavy):
        fill(small_disk, leave=1 << 20)
        with pytest.raises(OSError, match="GB free"):
            heavy.save_pretrained(small_disk / "model")
        assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize("content", ["{", "{}", '{"files": {"a": 1}}'])
def test_a_seal_that_cannot_be_ended_is_told(saved, content):
    (saved / SEALED).mkdir()
    (saved / SEALED / MANIFEST).write_text(content)
    for by in (load, from_pretrained):
        with refused(saved, "was broken off and cannot be ended"):
            by(saved)


def test_two_saves_at_once(model, newer, tmp_path):
    """As when every rank of a run saves: one of the two is there at the end, whole, and no error."""
    folder = tmp_path / "model"
    children = []
    for which in (model, newer) * 3:
        child = os.fork()
        if child == 0:  # pragma: no cover
            status = 1
            try:
                for _ in range(3):
                    which.save_pretrained(folder, max_shard_size="12KB")
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(children)
    loaded = load(folder, verify=True)
    assert same_weights(loaded, model) or same_weights(loaded, newer)
    assert left_behind(folder) == []
