"""The command line: quick help, tables and JSON, one clear sentence on error, and the commands end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnimoe.cli import COMMANDS, main
from omnimoe.commands._settings import field_sentences
from omnimoe.commands._tables import count, known, spread
from omnimoe.model import MODELS
from omnimoe.train import TrainSettings, load_settings
from tests.train.runs import tiny

ROOT = Path(__file__).parents[1]
SHORT = [
    *("--steps", "2", "--batch-size", "2", "--sequence-length", "128", "--evaluate-every", "1"),
    *("--evaluate-batches", "1", "--warmup", "1", "--precision", "fp32"),
]


def in_a_process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m omnimoe``, or a line of code, as a user would."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    call = ["-c", code] if code else ["-m", "omnimoe", *arguments]
    return subprocess.run(
        [sys.executable, *call], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def declared(tmp_path):
    """A tiny model in a JSON file, forgotten after the test."""
    path = tmp_path / "tiny_cli.json"
    tiny("mot").to_json_file(path)
    yield str(path)
    if "tiny_cli" in MODELS:
        MODELS.remove("tiny_cli")


def test_help_of_every_command_imports_no_torch():
    """All in one process: what none of them imports, each of them does not."""
    lines = [
        "import sys, io, contextlib",
        "from omnimoe.cli import main",
        f"for given in [[], ['--help'], ['--version'], *([name, '--help'] for name in {list(COMMANDS)})]:",
        "    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit): main(given)",
        "    assert told.getvalue().strip(), given",
        "loaded = {'torch', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)",
        "assert not loaded, loaded",
    ]
    done = in_a_process(code="\n".join(lines))
    assert done.returncode == 0, done.stderr


def test_help_names_every_command_and_every_setting(capsys):
    assert main([]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {summary}" in told for name, summary in COMMANDS.items())
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for name, sentence in field_sentences(TrainSettings).items():
        assert sentence.split(";")[0].rstrip(".").replace("`", "") in told, name


def test_every_setting_has_a_sentence():
    assert all(len(sentence) > 8 for sentence in field_sentences(TrainSettings).values())


def test_list_in_text_and_json(capsys):
    assert main(["list", "*_nano"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("dense_nano", "mot_nano", "moma_nano", "moe_nano", "2411.04996", "Apache-2.0"))
    assert main(["list", "*_nano", "--json"]) == 0
    infos = {info["name"]: info for info in json.loads(capsys.readouterr().out)}
    assert infos["mot_nano"]["total_params"] > infos["dense_nano"]["total_params"]
    assert infos["mot_nano"]["modalities"] == ["text", "image", "speech"]
    assert main(["list", "--names", "--family", "mot", "--json"]) == 0
    assert "mot_7b" in json.loads(capsys.readouterr().out)
    assert main(["list", "nothing_like_it", "--names", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_info_in_text_json_and_as_a_config(capsys):
    assert main(["info", "mot_nano"]) == 0
    told = capsys.readouterr().out
    assert "7,419,648" in told
    assert "active, speech" in told
    assert main(["info", "mot_nano", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["total_params"] == 7_419_648
    assert main(["info", "mot_nano", "--config"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "omnimoe"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["info", "mot_nanno"], "did you mean 'mot_nano'"),
        (["train", "mot_nanno", "--out", "x"], "did you mean 'mot_nano'"),
        (["compare", "dense", "mott"], "unknown model 'mott'"),
        (["train", "mot_nano", "--out", "x", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "mot_nano", "--out", "x", "--data", "nowhere"], "no corpus 'nowhere'"),
        (["train", "missing.json", "--out", "x"], "no file missing.json"),
        (["train", "mot_nano", "--out", "x", "--resume"], "nothing to resume"),
        (["train", "mot_nano", "--out", "x", "--device", "warp"], "--device warp cannot be used here"),
        (["compare", "dense", "mot", "--seeds", "0"], "at least one seed"),
        (["data", "info", "nowhere"], "no corpus 'nowhere'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_two(capsys, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, complaint = capsys.readouterr()
    assert told in complaint
    assert complaint.startswith(f"omnimoe {arguments[0]}: ")
    assert complaint.count("\n") == 1
    assert "Traceback" not in complaint
    assert not out


def test_verbose_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="did you mean"):
        main(["info", "mot_nanno", "--verbose"])


@pytest.mark.parametrize("arguments", [["train"], ["nothing"], ["train", "mot_nano", "--steps", "many", "--out", "x"]])
def test_a_wrong_call_exits_with_two(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: omnimoe" in capsys.readouterr().err


def test_a_failure_at_run_time_exits_with_one_and_ctrl_c_with_130(capsys, monkeypatch):
    def fail(error):
        def run(*_args, **_kwargs):
            raise error

        return run

    monkeypatch.setattr("omnimoe.hub.model_info", fail(RuntimeError("the disk is full")))
    assert main(["info", "mot_nano"]) == 1
    assert capsys.readouterr().err == "omnimoe info: the disk is full\n"
    monkeypatch.setattr("omnimoe.hub.model_info", fail(KeyboardInterrupt()))
    assert main(["info", "mot_nano"]) == 130
    assert capsys.readouterr().err == "omnimoe: interrupted\n"


def test_a_mistake_in_a_process_has_no_traceback():
    done = in_a_process("info", "mot_nanno")
    assert done.returncode == 2
    assert "did you mean 'mot_nano'" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_end_to_end(capsys, tmp_path, declared):
    out = tmp_path / "run"
    assert main(["train", declared, "--out", str(out), *SHORT, "--lr", "0.01", "--checkpoint-activations"]) == 0
    told = capsys.readouterr().out
    assert str(out / "checkpoint") in told
    assert "nats a token" in told
    kept = load_settings(out / "checkpoint")
    assert (kept.steps, kept.learning_rate, kept.checkpoint_activations) == (2, 0.01, True)
    assert (out / "log.jsonl").is_file()
    assert list((out / "tensorboard").iterdir())
    MODELS.remove("tiny_cli")
    assert main(["train", declared, "--out", str(out), *SHORT]) == 2
    assert "holds a checkpoint already; pass --resume" in capsys.readouterr().err
    # what is not said stays as it was, what is reported may change, what is learned may not
    assert main(["train", declared, "--out", str(out), "--resume", "--log-every", "5"]) == 0
    assert load_settings(out / "checkpoint") == kept.replace(log_every=5)
    MODELS.remove("tiny_cli")
    assert main(["train", declared, "--out", str(out), "--resume", "--lr", "0.002"]) == 2
    assert "learning_rate was 0.01 and is 0.002" in capsys.readouterr().err


def test_compare_end_to_end(capsys, tmp_path):
    names = ["tiny_cli_a", "tiny_cli_b"]
    for name, kind in zip(names, ("dense", "mot"), strict=True):
        MODELS.register(name)(lambda kind=kind: tiny(kind))
    try:
        out = tmp_path / "compared"
        assert main(["compare", *names, "--out", str(out), "--seeds", "1", *SHORT]) == 0
        told = capsys.readouterr().out
        assert "100 %" in told
        assert all(name in told for name in names)
        assert (out / "curves.png").is_file()
        assert main(["compare", *names, "--out", str(out), "--seeds", "2", *SHORT, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == json.loads((out / "comparison.json").read_text())
        assert found["seeds"] == [0, 1]
    finally:
        for name in names:
            MODELS.remove(name)


def test_data_info_in_text_and_json(capsys):
    assert main(["data", "info"]) == 0
    told = capsys.readouterr().out
    assert all(split in told for split in ("train", "val", "test", "pictures"))
    assert main(["data", "info", "p", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["triples"] > 10_000


def test_numbers_as_people_read_them():
    assert [count(number) for number in (0, 999, 1_000, 37_012_345, 1_501_700_000, 2e12)] == [
        *("0", "999", "1.0k", "37.0M", "1.50B", "2.00T")
    ]
    assert known(None) == "unknown"
    assert spread(None) == "–"
    assert spread({"mean": 0.5, "half": 0.1}, percent=True) == "50 ± 10 %"
    assert spread({"mean": 1.25, "half": None}) == "1.250"
