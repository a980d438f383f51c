"""What the doctor finds in real metadata: packages that do not fit, extras that are missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from omnimoe import cli, installation
from omnimoe.installation import EXTRAS, extras, misfits
from tests.refusals import unchanged

ROOT = Path(__file__).parents[2]


def install(folder, name, version, *requirements, source=None):
    told = folder / f"{name}-{version}.dist-info"
    told.mkdir()
    lines = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
    if source is not None:
        (folder / f"{name}.py").write_text(source)


def test_here_everything_fits(capsys):
    assert misfits() == []
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["misfits"] == []
    assert found["versions"]["torch"] is not None
    assert found["attention"]["sdpa"] == found["attention"]["eager"] == ""
    assert set(found["weights"]) == {"folder", "models", "offline"}


@pytest.mark.hazard(33)
@pytest.mark.parametrize(
    ("package", "version", "requirement", "message"),
    [
        ("megablocks", "0.10", "torch==2.4.*", r"megablocks 0.10 needs torch==2.4.\*, and .* is installed"),
        ("xformers", "0.0.20", "torch<2.1", r"xformers 0.0.20 needs torch<2.1, and .* is installed; pip install"),
        ("xformers", "0.0.99", "triton>99", r"xformers 0.0.99 needs triton>99"),
        ("megablocks", "9", "no-such-package>=1", "needs no-such-package, which is not installed"),
    ],
)
def test_versions_that_do_not_fit(package, version, requirement, message, tmp_path, monkeypatch):
    before = misfits()
    install(tmp_path, package, version, requirement)
    monkeypatch.syspath_prepend(str(tmp_path))
    with unchanged(tmp_path):
        (found,) = [told for told in misfits() if told not in before]
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "requirement", ["torch>=1", "nothing; extra == 'all'", "nothing; sys_platform == 'no'", "torch @ ???", "numpy"]
)
def test_versions_that_fit_or_do_not_matter(requirement, tmp_path, monkeypatch):
    before = misfits()
    install(tmp_path, "megablocks", "0.10", requirement)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert misfits() == before


@pytest.mark.hazard(33)
def test_a_compiled_part_that_does_not_fit(tmp_path):
    install(tmp_path, "torchaudio", "2.3.1", source="raise OSError('libtorchaudio.so: undefined symbol: _ZN3c10')\n")
    install(tmp_path, "torchvision", "0.15", "torch==2.0.0")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "omnimoe.cli", "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": path, "CXX": "no-such-compiler", "OMNIMOE_KERNELS": str(tmp_path)}
    with unchanged(*tmp_path.iterdir()):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    told = "\n".join(json.loads(done.stdout)["misfits"])
    assert "torchaudio 2.3.1 cannot be imported beside torch" in told
    assert "OSError: libtorchaudio.so: undefined symbol: _ZN3c10; install the release that was built for it" in told
    assert "torchvision 0.15 needs torch==2.0.0" in told


@pytest.mark.hazard(33)
def test_the_doctor_tells_it_and_fails(tmp_path, monkeypatch, capsys):
    install(tmp_path, "xformers", "0.0.20", "torch<2.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    with unchanged(tmp_path):
        assert cli.main(["doctor"]) == 1
    assert "does not fit     xformers 0.0.20 needs torch<2.1" in capsys.readouterr().out


def test_extras_are_those_of_the_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for_developers = {"viz", "test", "contract", "dev"}
    assert set(declared) - for_developers == set(EXTRAS)
    for name, extra in EXTRAS.items():
        lines = " ".join(declared[name]).replace("_", "-")
        for package in extra.packages:
            assert package.replace("_", "-") in lines or f"omnimoe[{package}]" in lines or "omnimoe[" in lines, name


def test_a_missing_package_of_an_extra(monkeypatch):
    monkeypatch.setattr(installation, "EXTRAS", {"own": installation.Extra("nothing", ("torch", "no-such-package"))})
    assert extras() == {"own": {"for": "nothing", "missing": ["no-such-package"]}}
