"""Saves take their place whole: what they replace, what they leave alone, and what an error in the middle leaves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import modeling_utils

from omnimoe import from_pretrained
from omnimoe import publish as publishing
from omnimoe.publish import MANIFEST, SEALED, publish, read_manifest, settle
from tests.checkpoint.files import INDEX, WEIGHTS, contents, left_behind, load, same_weights
from tests.refusals import refused, unchanged


@pytest.mark.hazard(13)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("stop"), RuntimeError("out of luck"), OSError(errno.EIO, "broken disk")]
)
def test_an_error_in_the_middle_of_a_save(saved, model, newer, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(modeling_utils, "safe_save_file", fail)
    with refused((saved, newer), str(error.args[-1]), type(error)):
        newer.save_pretrained(saved)
    monkeypatch.undo()
    assert left_behind(saved) == []
    assert same_weights(load(saved, verify=True), model)


@pytest.mark.hazard(13)
def test_a_folder_that_a_failed_save_made_is_gone(newer, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_utils, "safe_save_file", lambda *args, **kwargs: 1 / 0)
    for folder in ("model", "above/model"):
        with refused((tmp_path, newer), "division by zero", ZeroDivisionError):
            newer.save_pretrained(tmp_path / folder)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.hazard(13)
def test_what_a_failed_save_could_not_remove_goes_with_the_next(saved, newer, monkeypatch):
    """It is of this process, which still runs; one of another machine may be in use, and stays."""
    foreign = saved / ".omnimoe-saving-elsewhere-1-abc"
    foreign.mkdir()
    monkeypatch.setattr(modeling_utils, "safe_save_file", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(publishing.shutil, "rmtree", lambda *args, **kwargs: None)

    def seen() -> dict[str, str]:
        return {name: held for name, held in contents(saved).items() if not name.startswith(".")}

    with refused((seen, newer), "division by zero", ZeroDivisionError):
        newer.save_pretrained(saved)
    monkeypatch.undo()
    assert len(left_behind(saved)) == 2
    newer.save_pretrained(saved)
    assert left_behind(saved) == [foreign.name]
    assert same_weights(load(saved, verify=True), newer)


@pytest.mark.hazard(13)
def test_saving_over_the_file_that_is_being_read(saved, newer):
    """The weights of the loaded model may still lie in the file: it is replaced, not written into."""
    loaded = load(saved)
    with torch.no_grad():
        loaded.lm_head.weight.add_(1)
    with unchanged(loaded):
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
