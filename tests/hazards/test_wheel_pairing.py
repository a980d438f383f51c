"""Packages that do not fit each other: the doctor names both versions and what to install."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from omnimoe import cli
from omnimoe.installation import misfits, version_of
from tests.refusals import unchanged

pytestmark = pytest.mark.hazard(33)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder that is looked into before any other, as a stray one in PYTHONPATH is."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def pretend(site: Path, name: str, version: str, *requires: str) -> None:
    """The metadata of a wheel."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        (
            "transformers",
            "4.40.0",
            "transformers<6,>=5.17, and 4.40.0 is installed; pip install 'transformers<6,>=5.17'",
        ),
        ("torch", "2.15.0", "torch<2.15,>=2.11, and 2.15.0 is installed"),
        ("torch", "2.4.1", "torch<2.15,>=2.11, and 2.4.1 is installed"),
    ],
)
def test_a_version_outside_the_range_is_told_with_the_range(site, name, version, told):
    before = misfits()
    assert not any(complaint.startswith("omnimoe ") for complaint in before)
    pretend(site, name, version)
    assert version_of(name) == version
    with unchanged(site):
        found = [complaint for complaint in misfits() if complaint.startswith("omnimoe ")]
    assert len(found) == 1
    assert told in found[0]


def test_what_a_package_asks_for_and_nobody_installed_is_told(site):
    pretend(site, "torchvision", "0.1", "no-such-package>=2")
    with unchanged(site):
        (complaint,) = [told for told in misfits() if told.startswith("torchvision 0.1 needs")]
    assert "no-such-package, which is not installed; pip install 'no-such-package>=2'" in complaint


def test_a_compiled_part_for_another_torch_is_told_and_the_rest_still_works(site, monkeypatch, capsys):
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, loaded)
    (site / "torchaudio").mkdir()
    (site / "torchaudio" / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    pretend(site, "torchaudio", "2.4.0")
    assert cli.main(["doctor", "--json"]) == 1
    (complaint,) = [told for told in json.loads(capsys.readouterr().out)["misfits"] if "cannot be imported" in told]
    assert complaint.startswith("torchaudio 2.4.0 cannot be imported beside torch ")
    assert "OSError: undefined symbol: _ZN3c10; install the release that was built for it" in complaint
    # what the packages that it imports do to a process they have done by now
    with unchanged(site):
        assert cli.main(["doctor"]) == 1
    assert "torchaudio 2.4.0" in " ".join(capsys.readouterr().out.split())


def test_what_is_broken_by_a_version_alone_does_not_stop_the_rest(site):
    pretend(site, "safetensors", "not-a-version")
    with unchanged(site):
        assert isinstance(misfits(), list)
