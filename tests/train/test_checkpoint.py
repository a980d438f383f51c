"""A checkpoint is a model folder and the state of a run; a broken save leaves the last good one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from omnimoe import from_pretrained
from omnimoe.train import ResumeError, Training, load_settings, save_checkpoint
from omnimoe.train.checkpoint import checkpoints, load_checkpoint, load_state, restore
from tests.checkpoint.files import contents
from tests.refusals import refused, unchanged
from tests.train.runs import build, held_by, same_tensors, settings, tiny, training


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint", build(tiny()), settings(), {"step": 1})


def test_it_is_a_model_folder_with_settings_and_state(saved):
    model = build(tiny())
    assert same_tensors(dict(from_pretrained(saved).state_dict()), dict(model.state_dict()))
    assert load_settings(saved) == settings()
    assert load_state(saved) == {"step": 1}
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_a_model_without_state_is_no_run(tmp_path):
    folder = save_checkpoint(tmp_path / "model", build(tiny()), settings(), None)
    with pytest.raises(ResumeError, match="nothing to resume"):
        load_state(folder)
    with pytest.raises(ResumeError, match="no training.json"):
        load_settings(tmp_path)


def test_a_save_that_fails_half_way_leaves_the_last_good_one(saved, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(saved, build(tiny(), seed=1), settings(), {"step": 2})
    monkeypatch.undo()
    assert load_state(saved) == {"step": 1}
    save_checkpoint(saved, build(tiny(), seed=1), settings(), {"step": 3})
    assert load_state(saved) == {"step": 3}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["checkpoint", "checkpoint-000001"]


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_a_save_broken_off_among_its_renames_is_completed(saved, monkeypatch, survives):
    """The process dies when ``survives`` files have been moved."""
    replace, left = Path.replace, [survives]

    def die(path, target):
        if target.parent == saved:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, build(tiny(), seed=1), settings(), {"step": 2})
    monkeypatch.undo()
    assert restore(saved)
    assert load_state(saved) == {"step": 2}
    assert same_tensors(dict(from_pretrained(saved).state_dict()), dict(build(tiny(), seed=1).state_dict()))


def test_nothing_to_restore(tmp_path):
    assert not restore(tmp_path / "checkpoint")


def test_the_state_is_read_without_running_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"step": Trap()}, tmp_path / "training_state.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_resuming_needs_a_folder_a_checkpoint_the_settings_and_the_model(corpus, tmp_path):
    with pytest.raises(ResumeError, match="give it out="):
        training(corpus).resume()
    with pytest.raises(ResumeError, match="nothing to resume"):
        training(corpus, out=tmp_path).resume()
    training(corpus, out=tmp_path, steps=2).run()
    with pytest.raises(ResumeError, match="learning_rate was 0.002 and is 0.1"):
        training(corpus, out=tmp_path, steps=2, learning_rate=0.1).resume()
    with pytest.raises(ResumeError, match="steps was 2 and is 3, precision was 'fp32' and is 'bf16'"):
        training(corpus, out=tmp_path, steps=3, precision="bf16").resume()
    with pytest.raises(ResumeError, match="declared otherwise"):
        training(corpus, "mot", out=tmp_path, steps=2).resume()


def flip(path: Path) -> None:
    """Inverts one byte, three quarters into a file."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 0xFF
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
    "a flipped bit in the weights": ("model.safetensors", flip, "its SHA-256 differs"),
    "weights cut short": ("model.safetensors", cut, "when it was saved"),
    "no weights": ("model.safetensors", Path.unlink, "is missing, and"),
    "a flipped bit in the state": ("training_state.pt", flip, "its SHA-256 differs"),
    "a state cut short": ("training_state.pt", cut, "when it was saved"),
    "no state": ("training_state.pt", Path.unlink, "is missing, and"),
    "another config": ("config.json", lambda path: path.write_text("{}"), "when it was saved"),
    "no settings": ("training.json", Path.unlink, "is missing, and"),
    "a broken manifest": ("manifest.json", cut, "is no manifest of a save"),
}


def run_of(corpus, out: Path | None = None, **changes) -> Training:
    return training(corpus, "top_k", out=out, **{"save_every": 2, "evaluate_batches": 0, **changes})


@pytest.fixture(scope="module")
def half_way(corpus, tmp_path_factory) -> Path:
    """A run of six steps that was left at the fourth, its last two checkpoints kept."""
    folder = tmp_path_factory.mktemp("half-way")
    run_of(corpus, folder).run(until=4)
    return folder


@pytest.fixture(scope="module")
def unbroken(corpus) -> dict:
    run = run_of(corpus)
    run.run()
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.hazard(27)
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_passed_by_and_the_one_before_it_is_taken(
    corpus, tmp_path, caplog, half_way, unbroken, case
):
    name, damage, told = DAMAGE[case]
    out = tmp_path / "run"
    shutil.copytree(half_way, out)
    damage(out / "checkpoint" / name)
    run = run_of(corpus, out, seed=1)
    # what is damaged stays, for whoever wants to look at it
    with caplog.at_level(logging.WARNING, logger="omnimoe"), unchanged(out, draws=True):
        assert load_settings(out / "checkpoint") == run.settings
        run.resume()
    assert run.step == 2
    assert "passing by a damaged checkpoint" in caplog.text
    assert told in caplog.text
    run.run()
    assert same_tensors(dict(run.model.state_dict()), unbroken)
    # what was damaged has been replaced by what was learned again, and was never kept
    steps = [load_checkpoint(path)[1]["step"] for path in checkpoints(out / "checkpoint")]
    assert steps == [6, 4]


@pytest.mark.hazard(27)
def test_where_all_are_damaged_nothing_is_taken_and_nothing_is_deleted(corpus, tmp_path, half_way):
    out = tmp_path / "run"
    shutil.copytree(half_way, out)
    for folder in ("checkpoint", "checkpoint-000002"):
        flip(out / folder / "model.safetensors")
    run = run_of(corpus, out)
    with refused((lambda: held_by(run), out), f"no checkpoint in {out}", ResumeError) as told:
        run.resume()
    assert f"is whole: {out}/checkpoint/" in str(told)
    assert f"; {out}/checkpoint-000002/" in str(told)


@pytest.mark.hazard(27)
def test_a_missing_newest_checkpoint_leaves_the_one_before_it(corpus, tmp_path, half_way):
    out = tmp_path / "run"
    shutil.copytree(half_way, out)
    shutil.rmtree(out / "checkpoint")
    assert restore(out / "checkpoint")
    run = run_of(corpus, out)
    with unchanged(out, draws=True):
        run.resume()
    assert run.step == 2
    assert load_settings(out / "checkpoint") == load_settings(out / "checkpoint-000002")


@pytest.mark.hazard(27)
def test_the_last_good_one_stays_while_saves_fail(corpus, tmp_path, half_way, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(half_way, out)
    flip(out / "checkpoint" / "training_state.pt")
    run = run_of(corpus, out)
    run.resume()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))

    def good() -> dict[str, str]:
        return contents(out / "checkpoint-000002")

    with refused(good, "the disk is gone", OSError):
        run.run()
    monkeypatch.undo()
    again = run_of(corpus, out)
    again.resume()
    assert again.step == 2


@pytest.mark.hazard(27)
@pytest.mark.parametrize(
    ("keep", "wanted"),
    [(1, ["checkpoint"]), (3, ["checkpoint", "checkpoint-000004", "checkpoint-000005"])],
)
def test_as_many_checkpoints_are_kept_as_was_asked_for(corpus, tmp_path, keep, wanted):
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    with unchanged(mine):
        training(corpus, out=tmp_path, save_every=1, keep=keep, evaluate_batches=0).run()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == wanted
    assert [load_state(path)["step"] for path in checkpoints(tmp_path / "checkpoint")] == [6, 5, 4][:keep]


def test_kept_checkpoints_take_no_room_twice_and_are_model_folders(half_way):
    model = from_pretrained(half_way / "checkpoint-000002")
    assert model.config.modality_names == ("text", "image", "speech")
    manifest = json.loads((half_way / "checkpoint-000002" / "manifest.json").read_text())
    assert "training_state.pt" in manifest["files"]


def test_another_run_in_the_same_folder_keeps_nothing_of_the_first(corpus, tmp_path, half_way):
    out = tmp_path / "run"
    shutil.copytree(half_way, out)
    run_of(corpus, out, save_every=1).run(until=2)
    assert [load_state(path)["step"] for path in checkpoints(out / "checkpoint")] == [2, 1]
