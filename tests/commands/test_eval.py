"""``omnimoe eval`` from the command line to the report."""

from __future__ import annotations

import json

import pytest
import torch

from omnimoe.cli import main
from omnimoe.commands import eval as command
from omnimoe.commands.eval import labels
from omnimoe.generate import set_sampling
from tests.train.runs import build, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    for name in ("mot", "dense"):
        build(tiny(name)).save_pretrained(made / name / "checkpoint")
    return made


def test_two_folders_end_to_end(capsys, tmp_path, folders):
    given = ["eval", str(folders / "mot" / "checkpoint"), f"twin={folders / 'dense' / 'checkpoint'}"]
    short = ["--num", "4", "--candidates", "4", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*given, "--metrics", "retrieval", "tokenizers", *short]) == 0
    told = capsys.readouterr().out
    assert "mot" in told
    assert "twin" in told
    assert "text -> image, 1 of 4, gain" in told
    assert "which lose less than those of originals" in " ".join(told.split())
    assert (tmp_path / "report.html").is_file()
    kept = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert list(kept["models"]) == ["mot", "twin"]
    assert kept["settings"]["raw"] is False


def test_json_and_all_concepts(capsys, tmp_path, folders):
    given = ["eval", str(folders / "mot" / "checkpoint"), "--metrics", "loss", "--out", str(tmp_path), "--json"]
    assert main([*given, "--split", "drawing", "--num", "3", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert found["settings"]["split"] == "drawing"
    assert any("no running text" in note for note in found["metrics"]["loss"]["notes"])


def test_a_model_runs_in_float32_on_a_cpu_and_the_dtype_is_told(capsys, tmp_path):
    build(tiny("mot")).to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    given = ["eval", f"m={tmp_path / 'narrow'}", "--metrics", "loss", "--num", "3", "--out", str(tmp_path), "--json"]
    assert main([*given, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["dtype"] == {"m": "float32"}
    assert "float32" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_weights_that_ship_run_in_float32_on_a_cpu():
    assert command._model("omni_nano", "cpu", untrained=False, seed=0).dtype == torch.float32


def test_how_models_were_sampled_is_kept(capsys, tmp_path):
    model = build(tiny("mot"))
    set_sampling(model, {"speech": {"temperature": 0.6, "guidance": 2.0}})
    model.save_pretrained(tmp_path / "model")
    given = ["eval", f"m={tmp_path / 'model'}", "--metrics", "loss", "--num", "3", "--out", str(tmp_path), "--json"]
    asked = ["--device", "cpu", "--temperature", "0.7", "--guidance", "image=3,speech=1", "--best-of", "2"]
    kept = {}
    for name in ("even", "saved"):
        assert main([*given, *asked, "--sampling", name]) == 0
        kept[name] = json.loads(capsys.readouterr().out)["settings"]
    assert kept["even"]["sampling"] == {
        "image": {"temperature": 0.7, "top_k": 100, "guidance": 3.0, "best_of": 2},
        "speech": {"temperature": 0.7, "top_k": 50, "guidance": 1.0},
        "text": {"temperature": 0.0},
    }
    assert "saved_sampling" not in kept["even"]
    assert kept["saved"]["sampling"] == {
        "image": {"temperature": 0.7, "guidance": 3.0, "best_of": 2},
        "speech": {"temperature": 0.7, "guidance": 1.0},
    }
    assert kept["saved"]["saved_sampling"] == {"m": {"speech": {"temperature": 0.6, "guidance": 2.0}}}


def test_a_name_without_weights(capsys, tmp_path):
    given = ["eval", "mot_nano", "--metrics", "loss", "--num", "3", "--out", str(tmp_path), "--device", "cpu"]
    assert main(given) == 2
    assert "there are no weights for 'mot_nano'; train it and pass the folder" in capsys.readouterr().err
    assert main([*given, "--untrained", "--json"]) == 0
    assert "mot_nano" in json.loads(capsys.readouterr().out)["models"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere"),
        (["mot_nano", "--num", "many"], "--num must be a number of concepts or 'all', got 'many'"),
        (["mot_nano", "--metrics", "retrival"], "did you mean 'retrieval'"),
        (["mot_nano", "--untrained", "--raw", "nowhere"], "nowhere is not a built corpus"),
        (["mot_nano", "--untrained", "--candidates", "1"], "candidates must be sizes of at least 2"),
        (["mot_nano", "--untrained", "--best-of", "0"], "best_of of image must be at least 1, got 0"),
        (["mot_nano", "--untrained", "--temperature", "-1"], "temperature must be 0 or more and finite, got -1"),
        (["mot_nano", "--best-of", "text=3"], "--best-of takes image=X and speech=X, got 'text'"),
        (["mot_nano", "--guidance", "text=3"], "--guidance takes image=X and speech=X, got 'text'"),
        (["a=x", "a=y"], "two models are called 'a'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_two(capsys, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert told in complaint
    assert complaint.startswith("omnimoe eval: ")
    assert complaint.count("\n") == 1


def test_labels_tell_folders_apart():
    assert labels(["runs/mot/checkpoint", "runs/dense/checkpoint"]) == {
        "mot": "runs/mot/checkpoint",
        "dense": "runs/dense/checkpoint",
    }
    assert labels(["a/mot/checkpoint", "b/mot/checkpoint"]) == {"mot": "a/mot/checkpoint", "mot-2": "b/mot/checkpoint"}
    assert labels(["/x/y", "z=/x/y"]) == {"y": "/x/y", "z": "/x/y"}
