"""Saves onto a disk that is too small: what was there is unchanged, and nothing is left lying about.

The disk is one of 16 MB in memory, in a mount namespace of a child process: of a user namespace, so that nobody needs
to be root, and of root's where user namespaces are forbidden.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omnimoe import publish as publishing
from omnimoe.experts import FeedForward
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.train.checkpoint import load_state, save_checkpoint
from omnimoe.train.settings import TrainSettings
from tests.checkpoint.files import WEIGHTS, contents, left_behind, load, same_weights, small
from tests.children import in_child
from tests.declarations import build
from tests.refusals import refused

pytestmark = pytest.mark.hazard(14)
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
PRIVATE = 1 << 18 | 1 << 14
PAGE = 4096


def mount(place: Path) -> str:
    """Puts an empty disk at a place, for this process alone; says why where it must not."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if not hasattr(library, "unshare"):
        return "this system has no namespaces"
    if library.unshare(NEW_USER | NEW_MOUNTS) == 0:
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        except OSError as error:
            return f"a user namespace is refused: {error}"
    elif library.unshare(NEW_MOUNTS) != 0 or library.mount(b"none", b"/", None, PRIVATE, None) != 0:
        return f"namespaces are refused: {os.strerror(ctypes.get_errno())}"
    if library.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=16m") != 0:
        return f"a disk in memory is refused: {os.strerror(ctypes.get_errno())}"
    return ""


@pytest.fixture
def disk(tmp_path) -> Path:
    """Where the disk is, in the child."""
    place = tmp_path / "disk"
    place.mkdir()
    refusal = in_child(lambda: mount(place))
    if refusal:
        pytest.skip(refusal)
    return place


def on_a_small_disk(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test in a child, in which ``disk`` is one of 16 MB."""

    @functools.wraps(test)
    def run(disk: Path, **given: Any) -> None:
        in_child(lambda: mount(disk) or test(disk=disk, **given))
        assert list(disk.iterdir()) == [], "it was the child's alone"

    return run


@pytest.fixture(scope="module")
def heavy() -> OmniMoeForCausalLM:
    """A model of 4.5 MB, so that four do not fit."""
    return build(
        small("dense", hidden_size=128, experts=FeedForward.Config(intermediate_size=1024), initializer_range=0.02)
    )


def fill(disk: Path, *, leave: int) -> None:
    """Takes the disk but for ``leave`` bytes."""
    (disk / "ballast").unlink(missing_ok=True)
    held = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(held.f_bavail * held.f_bsize - leave))


def check_old_one(folder: Path, old: OmniMoeForCausalLM, before: dict[str, str]) -> None:
    """What was there is there as it was, and nothing else."""
    assert contents(folder) == before
    assert left_behind(folder) == []
    assert same_weights(load(folder, verify=True), old)


@pytest.mark.parametrize("shards", ["1GB", "1MB"])
@on_a_small_disk
def test_free_space_is_asked_for_first(disk, heavy, shards, monkeypatch):
    folder = disk / "model"
    heavy.save_pretrained(folder, max_shard_size=shards)
    before = contents(folder)
    fill(disk, leave=2 << 20)
    monkeypatch.setattr(publishing.tempfile, "mkdtemp", lambda **_: pytest.fail("something was written"))
    with refused((disk, heavy), "nothing was written, free some space", OSError) as error:
        heavy.save_pretrained(folder, max_shard_size=shards)
    assert error.value.errno == errno.ENOSPC
    check_old_one(folder, heavy, before)


@pytest.mark.parametrize("shards", ["1GB", "1MB"])
@pytest.mark.parametrize("leave", [1 << 20, 200_000])
@on_a_small_disk
def test_it_fills_up_while_the_weights_are_written(disk, heavy, shards, leave, monkeypatch):
    folder = disk / "model"
    heavy.save_pretrained(folder, max_shard_size=shards)
    before = contents(folder)
    fill(disk, leave=leave)
    # others may fill it after the question
    monkeypatch.setattr(OmniMoeForCausalLM, "_bytes_to_save", lambda *_: 0)
    with refused((disk, heavy), f"no space left on the disk of {folder}", OSError) as error:
        heavy.save_pretrained(folder, max_shard_size=shards)
    assert "what it held is unchanged" in str(error)
    assert error.value.errno == errno.ENOSPC
    check_old_one(folder, heavy, before)


@on_a_small_disk
def test_it_fills_up_at_each_file_after_the_weights(disk, model, newer, monkeypatch):
    """Page by page more room: the old model until there is enough for the new one."""
    folder = disk / "model"
    model.save_pretrained(folder)
    before, weights = contents(folder), (folder / WEIGHTS).stat().st_size
    monkeypatch.setattr(OmniMoeForCausalLM, "_bytes_to_save", lambda *_: 0)
    for pages in range(40):
        fill(disk, leave=weights // PAGE * PAGE + pages * PAGE)
        with refused((disk, newer), "what it held is unchanged", OSError, is_sure=False) as failure:
            newer.save_pretrained(folder)
        if failure.value is None:
            break
        assert failure.value.errno == errno.ENOSPC
        check_old_one(folder, model, before)
    assert pages >= 4, "there are a config, settings of generation, a card and a manifest"
    assert left_behind(folder) == []
    assert same_weights(load(folder, verify=True), newer)


@on_a_small_disk
def test_the_state_of_a_run(disk, model):
    folder = disk / "checkpoint"
    save_checkpoint(folder, model, TrainSettings(), {"step": 1})
    before = contents(folder)
    fill(disk, leave=1 << 20)
    # the one before is kept beside it by then, as it is for a save that goes through
    with refused((folder, model), "no space left", OSError) as error:
        save_checkpoint(folder, model, TrainSettings(), {"step": 2, "moments": torch.ones(1 << 20)})
    assert error.value.errno == errno.ENOSPC
    check_old_one(folder, model, before)
    assert load_state(folder) == {"step": 1}


@on_a_small_disk
def test_a_first_save_leaves_no_folder(disk, heavy, monkeypatch):
    fill(disk, leave=1 << 20)
    for message in ("GB free", "no space left"):
        with refused((disk, heavy), message, OSError) as error:
            heavy.save_pretrained(disk / "above" / "model")
        assert error.value.errno == errno.ENOSPC
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        monkeypatch.setattr(OmniMoeForCausalLM, "_bytes_to_save", lambda *_: 0)
