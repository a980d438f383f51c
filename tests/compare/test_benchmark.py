"""The plan of the comparison runs, is shared and resumed, and its tables say what the kept runs say."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from benchmarks import compare_flops, compare_tables
from omnimoe.compare import ALL, ARCHITECTURES, Comparison, Run, claimed
from omnimoe.data import Corpus
from omnimoe.model import MODELS
from omnimoe.train import History
from omnimoe.train.data import held_out_batches
from tests.compare.curves import falling
from tests.train.runs import settings

AHEAD = {"mot_moe", "moma_2t2i2s", "moma_4t4i4s", "moe4x", "moe12x", "momad_4t4i4s"}
SPEEDS = {"mot": 2.0, "mot_networks": 1.25, "mamba": 0.8, "mixture_of_mamba": 1.6, "moe4x": 1.25}


def kept(name: str, seed: int) -> Run:
    """A finished run whose step match is known."""
    architecture = name.removesuffix("_pico")
    steps, noise = np.arange(20, 401, 20), np.random.default_rng(seed).normal(0, 0.002, 20)
    speed = SPEEDS.get(architecture, 1.0) * (1 + 0.01 * seed * (architecture == "mot"))
    losses, alone = ((falling(steps, speed=speed / factor) + noise).tolist() for factor in (1.0, 1.25))
    kinds = ("text", "image", "speech", ALL)
    return Run(
        model=name,
        settings=compare_flops.SIZES["pico"].settings.replace(seed=seed),
        history=History(
            steps=[0, *steps.tolist()],
            held_out={kind: [9.0, *losses] for kind in kinds},
            causal={kind: [9.0, *alone] for kind in kinds} if architecture in AHEAD - {"momad_4t4i4s"} else {},
            seconds=100.0,
        ),
        config={},
        is_causal=architecture not in AHEAD,
        forward_flops=1e6,
        total_params=1,
        active_params=1,
        environment={"date": "2026-11-23"},
    )


@pytest.fixture
def out(tmp_path):
    for size, name, seed in compare_flops.planned(["pico"], [], 3):
        kept(name, seed).save(compare_flops.folder_of(tmp_path, size, name, seed))
    times = {"mot_pico": {"ratio": 1.5, "seconds": 0.3, "base_seconds": 0.2}}
    (tmp_path / "pico" / "times.json").write_text(json.dumps(times))
    return tmp_path


def test_the_plan_names_registered_models_each_once_with_slow_ones_last():
    runs = compare_flops.planned(list(compare_flops.SIZES), [], 3)
    assert len(set(runs)) == len(runs) == 3 * 4 * len(ARCHITECTURES)
    assert all(name in MODELS for _, name, _ in runs)
    pico = [(name, seed) for size, name, seed in runs if size == "pico"]
    assert pico[0] == ("dense_pico", 0)
    assert ["mamba" in name for name, _ in pico] == sorted("mamba" in name for name, _ in pico)
    chosen = compare_flops.planned(["pico", "nano"], ["mot", "nano"], 1)
    assert ("pico", "mot_pico", 0) in chosen
    assert ("pico", "dense_pico", 0) not in chosen
    assert ("nano", "dense_nano", 0) in chosen


def test_what_is_finished_running_and_left(out, capsys):
    (out / "pico" / "mot_pico-seed2" / "run.json").unlink()
    (out / "pico" / "moe_pico-seed1" / "run.json").unlink()
    with claimed(out / "pico" / "mot_pico-seed2"):
        compare_flops.main(["--out", str(out), "--sizes", "pico", "--list"])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["finished"].split()[0] == str(3 * len(ARCHITECTURES) - 2)
    assert told["running"].split() == ["1", "mot_pico-seed2"]
    assert told["left"].split() == ["1", "moe_pico-seed1"]


def test_it_trains_what_is_left_and_no_other(out, capsys, monkeypatch):
    short = settings(steps=2, evaluate_every=1, save_every=1, batch_size=1)
    sizes = {"pico": dataclasses.replace(compare_flops.SIZES["pico"], settings=short)}
    monkeypatch.setattr(compare_flops, "SIZES", sizes)
    for name in ("dense_pico-seed0", "mot_pico-seed0"):
        (out / "pico" / name / "run.json").unlink()
    with claimed(out / "pico" / "mot_pico-seed0"):
        compare_flops.train(out, compare_flops.planned(["pico"], [], 3))
    told = capsys.readouterr().out
    assert re.findall(r"(\w+) seed (\d)", told) == [("dense_pico", "0")]
    assert Run.load(out / "pico" / "dense_pico-seed0").history.steps == [0, 1, 2]
    assert not list((out / "pico" / "dense_pico-seed0").glob("checkpoint*")), "weights are not kept"


def test_a_run_that_fails_does_not_hold_up_the_others(out, capsys, monkeypatch):
    for name in ("dense_pico-seed0", "mot_pico-seed0"):
        (out / "pico" / name / "run.json").unlink()
    asked = []

    def fails(name, *_, **__):
        asked.append(name)
        if name == "dense_pico":
            raise RuntimeError("the loss is nan at step 3")
        return kept(name, 0)

    monkeypatch.setattr(compare_flops, "train_run", fails)
    with pytest.raises(SystemExit, match="1 of 54 runs failed; the same command tries them again"):
        compare_flops.train(out, compare_flops.planned(["pico"], [], 3))
    assert asked == ["dense_pico", "mot_pico"]
    assert "dense_pico-seed0: the loss is nan" in capsys.readouterr().err


def test_results_are_saved_drawn_and_told(out, tmp_path_factory, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("results")
    compare_flops.main(["--out", str(out), "--save", "2026-11-23", "--results", str(folder)])
    paths = sorted(path.name for path in folder.iterdir())
    stem = "2026-11-23-compare-flops-pico"
    assert paths == [f"{stem}-shares.png", f"{stem}.json", f"{stem}.png"], "sizes without a finished run leave none"
    plain = json.loads((folder / f"{stem}.json").read_text())
    assert Comparison.from_dict(plain).modalities == ["text", "image", "speech", ALL]
    capsys.readouterr()
    compare_flops.main(["--table", "--results", str(folder)])
    told = capsys.readouterr().out
    rows = {}
    for line in told.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("`") and cells[0].endswith("_pico`"):
            rows[cells[0].strip("`").removesuffix("_pico"), cells[1]] = cells[2:]
    assert f"{3 * len(ARCHITECTURES)} of {3 * len(ARCHITECTURES)} runs are finished" in told
    assert rows["dense", "causal"][2] == "100 %"
    assert rows["mot", "causal"][0] == "3"
    assert re.fullmatch(r"(49|50) ± \d %", rows["mot", "causal"][2])
    text, *_, everything = rows["mot", "1.50"]
    assert everything.startswith("74 "), "steps times seconds a step"
    assert re.fullmatch(r"7\d ± \d+ %", text), "with the interval of the steps"
    assert re.search(r"\| `mot` \| – \| 76 % \| 47 % \| 1.50 \| 7\d ± ", told)
    assert rows["mixture_of_mamba", "causal"][2].startswith("50 "), "in the steps of mamba"
    assert rows["moe4x", "looks ahead"][2].startswith("80 ")
    assert rows["moe4x", "causal"][2].startswith("100 ")
    assert ("momad_4t4i4s", "looks ahead") in rows
    assert ("momad_4t4i4s", "causal") not in rows
    assert "| MoT beats MoE-4x on pictures | yes, -3" in told
    assert "| untied attention saves further on pictures | no, the opposite, +2" in told
    assert "| `mot` | 53-66 % | 20-35 % | 15-20 % |" in told
    assert f"pico: of {len(compare_tables.CLAIMS)} findings" in told
    assert f"(../benchmarks/results/{stem}-shares.png)" in told
    page = folder / "page.md"
    page.write_text(f"# Before\n{compare_tables.BEGIN}\nstale\n{compare_tables.END}\nbehind\n")
    for _ in range(2):
        compare_flops.main(["--write", str(page), "--results", str(folder)])
        text = page.read_text()
        assert text.startswith("# Before\n")
        assert text.endswith(f"{compare_tables.END}\nbehind\n")
        assert "stale" not in text
        assert text.count("### Findings") == 1
    page.write_text("# Before\n")
    with pytest.raises(ValueError, match="has no lines"):
        compare_flops.main(["--write", str(page), "--results", str(folder)])


def test_a_part_of_the_runs_makes_a_part_of_the_tables(out, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("results")
    for size, name, seed in compare_flops.planned(["pico"], [], 3):
        if name not in ("dense_pico", "mot_pico") or seed == 2:
            (compare_flops.folder_of(out, size, name, seed) / "run.json").unlink()
    pytest.importorskip("matplotlib")
    compare_flops.main(["--out", str(out), "--save", "2026-11-23", "--results", str(folder)])
    capsys.readouterr()
    compare_flops.main(["--table", "--results", str(folder)])
    told = capsys.readouterr().out
    assert f"4 of {3 * len(ARCHITECTURES)} runs are finished" in told
    assert "| MoT beats MoE-4x on pictures | – |" in told
    assert "mixture_of_mamba_pico" not in told


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([-0.2, -0.21, -0.19], "yes, -20 ± 2"),
        ([0.2, 0.21, 0.19], "no, the opposite, +20 ± 2"),
        ([-0.2, 0.1, 0.0], "not told, -3 ± 38"),
        ([-0.2], "one seed, -20"),
        ([], "–"),
    ],
)
def test_a_finding_is_told_from_chance(found, told):
    assert compare_tables.verdict(found) == told


def test_the_figures_of_papers_are_of_architectures_of_the_plan():
    sides = [side for _, left, right in compare_tables.CLAIMS for side in (left, right) if side is not None]
    published = {*compare_tables.PUBLISHED, *compare_tables.PUBLISHED_TIME}
    assert {name for name, _ in sides} | published <= set(ARCHITECTURES)
    drawn = {name for names in compare_tables.PANELS.values() for name in names}
    assert drawn == set(ARCHITECTURES)


@pytest.mark.parametrize("size", compare_flops.SIZES)
def test_the_corpus_fits_every_size(size):
    found = compare_flops.SIZES[size]
    short = found.settings.replace(batch_size=1, evaluate_batches=1)
    corpus = Corpus.load(short.data)
    (batch,) = held_out_batches(MODELS.get(compare_flops.names_of(size)[0])(), short, corpus)
    assert batch["input_ids"].shape == (1, short.sequence_length)
    assert batch["modality_ids"].unique().numel() > 1
