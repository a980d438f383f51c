"""What a save writes is on the disk before it counts: power may fail, and a name must not outlive what it names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.publish import MANIFEST, SEALED, publish
from omnimoe.train.checkpoint import save_checkpoint
from omnimoe.train.settings import TrainSettings
from tests.refusals import unchanged


def write_folders(model: OmniMoeForCausalLM, folder: Path) -> None:
    """Files in folders of their own, which no model has."""
    with publish(folder) as fresh:
        (fresh / "a" / "b").mkdir(parents=True)
        for name in ("x", "a/y", "a/b/z"):
            (fresh / name).write_text(name)


SAVES: dict[str, Callable[[OmniMoeForCausalLM, Path], object]] = {
    "one file": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="12KB"),
    "a run": lambda model, folder: save_checkpoint(folder, model, TrainSettings(), {"step": 2}),
    "folders": write_folders,
}


@dataclass(frozen=True)
class Call:
    """A call of a save: what is flushed or moved, where to, and what was there before the call."""

    path: Path
    to: Path | None
    there: dict[Path, tuple[int, int]]
    """Of each file and folder its number, by which it is known under any name, and the time of its last change."""


def watched(save: Callable[[], object], folder: Path) -> list[Call]:
    """Every flush and every move of a save, in order. They are made, too."""
    calls: list[Call] = []

    def watch(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *to: Any, **given: Any) -> Any:
            held = {path: path.stat() for path in (folder.parent, folder, *folder.rglob("*")) if path.exists()}
            there = {path: (status.st_ino, status.st_mtime_ns) for path, status in held.items()}
            if to:
                calls.append(Call(Path(what), Path(*to), there))
            else:
                path = next((path for path in held if os.path.samestat(os.fstat(what), held[path])), folder.parents[1])
                calls.append(Call(path, None, there))
            return real(what, *to, **given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace"):
            patch.setattr(os, name, watch(getattr(os, name)))
        save()
    return calls


@pytest.mark.hazard(13)
@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("kind", SAVES)
def test_what_counts_is_on_the_disk_before_it_does(model, newer, tmp_path, kind, is_new):
    folder = tmp_path / "above" / "model"
    if not is_new:
        SAVES[kind](model, folder)
    with unchanged(newer):
        calls = watched(lambda: SAVES[kind](newer, folder), folder)
    moves = [number for number, call in enumerate(calls) if call.to is not None]
    seal, last = next(number for number in moves if calls[number].to == folder / SEALED), moves[-1]

    def is_flushed(path: Path, before: int, since: int = 0) -> bool:
        """Whether something, as it is before a call, was flushed since another."""
        now = calls[before].there[path]
        return any(call.to is None and call.there.get(call.path) == now for call in calls[since:before])

    fresh = calls[seal].path
    staged = [path for path in calls[seal].there if fresh in (path, *path.parents)]
    assert fresh / MANIFEST in staged
    assert [path for path in staged if not is_flushed(path, seal)] == [], "sealed, and may not be on the disk"
    if is_new:
        assert is_flushed(folder.parent, seal), "the folder may not be on the disk"
        assert folder.parents[1] in [call.path for call in calls[:seal]], "nor the one it is in"
    assert (calls[seal + 1].path, calls[seal + 1].to) == (folder, None), "the seal may not be on the disk"

    assert calls[last].to == folder / MANIFEST, "the manifest comes last"
    targets = {folder, *(path for path in calls[last].there if path.is_dir() and folder in path.parents)}
    targets = {path for path in targets if SEALED not in path.parts}
    assert [path for path in targets if not is_flushed(path, last, seal)] == [], "moved, and may not be on the disk"
    assert (calls[last + 1].path, calls[last + 1].to) == (folder, None)
