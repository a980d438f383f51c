"""Several models and metrics in one evaluation: what is kept, what is written, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnimoe.evaluate import METRICS, Measure, NotRunError, evaluate, register_metric
from omnimoe.evaluate.base import BUILT_IN, metric_names, title_of
from omnimoe.evaluate.tables import cell, header, lines
from omnimoe.registry import RegistryError
from tests.train.runs import build, tiny


@pytest.fixture
def _own_metric():
    @register_metric("caption_length")
    def caption_length(bench):
        """Words of the names that a model gives to held-out pictures."""
        pictures = [[("image", bench.picture(example))] for example in bench.concepts("image")]
        for of, model in bench.models.items():
            told = [made.raw.split() for made in bench.generate(model, pictures, "text", max_new_tokens=8)]
            yield Measure(of=of, name="words of a name", value=sum(map(len, told)) / len(told), count=len(told))

    yield
    METRICS.remove("caption_length")


@pytest.mark.usefixtures("_own_metric")
def test_a_metric_of_the_user_in_a_few_lines(few, fresh, tmp_path):
    assert metric_names() == [*BUILT_IN, "caption_length"]
    found = evaluate({"fresh": fresh}, corpus=few, split="train", metrics=["caption_length"], num=3, out=tmp_path)
    (measure,) = found.measures["caption_length"]
    assert measure.count == 3
    assert 0 <= measure.value <= 8
    assert "Words of the names" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_plugin_may_bring_a_metric(tmp_path):
    lines = ["from omnimoe import register_metric", "", "@register_metric('plugged')", "def plugged(bench):"]
    (tmp_path / "plugged_metric.py").write_text("\n".join([*lines, "    return []", ""]), encoding="utf-8")
    told = tmp_path / "plugged_metric-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-metric\nVersion: 1.0\n", encoding="utf-8")
    (told / "entry_points.txt").write_text("[omnimoe.plugins]\nmetric = plugged_metric\n", encoding="utf-8")
    code = "from omnimoe.evaluate.base import metric_names; print(metric_names()[-1])"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "plugged"


def test_two_models_side_by_side_on_the_same_concepts(few, fresh, learned, tmp_path):
    models = {"learned": learned, "fresh": fresh}
    found = evaluate(models, corpus=few, split="train", metrics=["retrieval"], num=6, candidates=(4,), out=tmp_path)
    assert found.columns("retrieval") == ["learned", "fresh"]
    assert header(found, "retrieval") == ["", "unit", "learned", "fresh", "chance", "n"]
    told = {line[0]: line for line in lines(found, "retrieval")}
    assert told["text -> image, 1 of 4, gain"][1] == "% ↑"
    assert told["text -> image, 1 of 4, gain"][4:] == ["25.0 %", "6"]
    kept = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(found.to_dict()))
    assert kept["settings"]["num"] == 6
    assert kept["environment"]["corpus"].startswith("p ")
    assert set(kept["metrics"]["retrieval"]["files"]) == {"retrieval-learned.png", "retrieval-fresh.png"}
    assert all((tmp_path / name).is_file() for name in kept["metrics"]["retrieval"]["files"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_a_run_repeats(few, fresh):
    options = {"corpus": few, "split": "train", "metrics": ["loss", "retrieval"], "num": 4, "candidates": (4,)}
    assert evaluate({"m": fresh}, **options).measures == evaluate({"m": fresh}, **options).measures


def test_models_are_left_as_they_were(few):
    model = build(tiny("dense")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate({"m": model}, corpus=few, split="train", metrics=["loss"], num=3)
    assert model.training
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_a_metric_that_cannot_run_is_told_with_its_reason(few, fresh, tmp_path):
    @register_metric("impossible")
    def impossible(bench):
        """Never runs."""
        raise NotRunError("needs a microscope; buy one")
        yield

    try:
        found = evaluate({"m": fresh}, corpus=few, split="train", metrics=["impossible"], out=tmp_path)
    finally:
        METRICS.remove("impossible")
    assert found.not_run == {"impossible": "needs a microscope; buy one"}
    assert "needs a microscope" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_model_whose_tokens_see_later_ones_is_noted(few):
    model = build(tiny("expert_choice"))
    found = evaluate({"moma": model}, corpus=few, split="train", metrics=["loss"], num=3)
    assert any("moma sees later tokens" in note for note in found.notes["loss"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num": 2}, "num must be at least 3"),
        ({"candidates": (1, 4)}, "candidates must be sizes of at least 2"),
        ({"candidates": ()}, "candidates must be sizes of at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"split": "tset"}, "unknown split 'tset'"),
        ({"corpus": "nowhere"}, "no corpus 'nowhere'"),
    ],
)
def test_options_out_of_range(fresh, options, told):
    with pytest.raises(ValueError, match=told):
        evaluate({"m": fresh}, **{"metrics": ["loss"], **options})


def test_a_split_that_a_metric_cannot_use_is_told_and_the_rest_runs(corpus, few, fresh):
    found = evaluate({"m": fresh}, corpus=few, split="val", metrics=["loss"])
    assert "has no row with text" in found.not_run["loss"]


def test_a_label_that_is_a_column_is_refused(fresh):
    with pytest.raises(ValueError, match="'real' is the column of what models are held against"):
        evaluate({"real": fresh})


def test_no_model_and_an_unknown_metric(fresh):
    with pytest.raises(ValueError, match="there is no model to evaluate"):
        evaluate({})
    with pytest.raises(RegistryError, match="did you mean 'retrieval'"):
        evaluate({"m": fresh}, metrics=["retrival"])


def test_what_is_no_number_is_no_measure():
    with pytest.raises(ValueError, match="which is no measure"):
        Measure(of="m", name="x", value=float("nan"))
    with pytest.raises(ValueError, match="better must be"):
        Measure(of="m", name="x", value=1.0, better="bigger")


def test_cells_as_people_read_them():
    share = Measure(of="m", name="x", value=0.345, unit="share", low=0.24, high=0.46)
    assert cell(share) == "34.5 % (24-46)"
    assert cell(share, intervals=False) == "34.5 %"
    assert cell(Measure(of="m", name="x", value=22.41, unit="dB", low=21.0, high=23.8)) == "22.4 ± 1.4"
    assert cell(Measure(of="m", name="x", value=7.0, unit="clips")) == "7"
    assert cell(None) == "–"


def test_every_built_in_metric_has_a_title():
    assert all(len(title_of(name)) > 20 for name in BUILT_IN)
