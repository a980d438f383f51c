"""A checkpoint is a model folder and the state of a run; a broken save leaves the last good one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omnimoe import from_pretrained
from omnimoe.train import ResumeError, load_settings, save_checkpoint
from omnimoe.train.checkpoint import load_state, restore
from tests.train.runs import build, same_tensors, settings, tiny, training


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
