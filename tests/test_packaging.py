"""What gets installed: the packages, their data, one version, and a command."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def setup_file():
    spec = importlib.util.spec_from_file_location("omnimoe_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        spec.loader.exec_module(module)
    return module


def folders_with_python() -> set[str]:
    names = set()
    for top, prefix in (("omnimoe", ""), ("zoo", "omnimoe.")):
        for file in (ROOT / top).rglob("*.py"):
            names.add(prefix + ".".join(file.parent.relative_to(ROOT).parts))
    return names


def test_every_folder_with_python_is_a_package_that_is_installed(setup_file):
    assert sorted(setup_file.PACKAGES) == sorted(folders_with_python() | {"omnimoe.csrc"})


def test_every_data_file_is_installed(setup_file):
    listed = subprocess.run(
        ["git", "ls-files", "omnimoe", "zoo", "csrc"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git repository, or no git")
    covered = set()
    for package, patterns in setup_file.PACKAGE_DATA.items():
        beside = {"omnimoe.zoo": "zoo", "omnimoe.csrc": "csrc"}
        folder = ROOT / beside.get(package, package.replace(".", "/"))
        for pattern in patterns:
            # A pattern that ends in ** means folders to pathlib, and files too to setuptools.
            covered |= {file for file in folder.glob(re.sub(r"\*\*$", "**/*", pattern)) if file.is_file()}
    data = {ROOT / name for name in listed.stdout.splitlines() if not name.endswith(".py")}
    assert data - covered == set(), "list them in setup.py, or take them out of the package"


def test_one_version():
    package = importlib.import_module("omnimoe")
    assert package.__version__ == importlib.metadata.version("omnimoe"), "install again: pip install -e ."
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == package.__version__


def test_the_command_exists():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="omnimoe")
    assert script.value == PROJECT["scripts"]["omnimoe"]
    assert callable(script.load())


def test_the_zoo_is_installed_beside_the_package():
    zoo = importlib.import_module("omnimoe.zoo")
    assert zoo.__name__ == "omnimoe.zoo"
    assert Path(zoo.__file__).is_file()


def test_importing_the_package_is_cheap():
    """Public names load on first use: a completion in a shell must not wait for torch."""
    code = "import sys, omnimoe; print(*sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.split() == []


def test_every_public_name_resolves():
    package = importlib.import_module("omnimoe")
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


def test_a_module_never_hides_the_public_name_it_is_called_like():
    """Importing ``omnimoe.flops`` sets ``flops`` on the package, where the function of that name should be."""
    code = (
        "import importlib, pkgutil, types, omnimoe\n"
        "names = {found.name for found in pkgutil.iter_modules(omnimoe.__path__)} & set(omnimoe.__all__)\n"
        "for name in names: importlib.import_module(f'omnimoe.{name}')\n"
        "print(*(name for name in names if isinstance(getattr(omnimoe, name), types.ModuleType)))"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.split() == []


def test_examples_in_the_docstrings_of_the_zoo():
    """pytest would import zoo/ under its folder's name and so register every model a second time."""
    zoo = importlib.import_module("omnimoe.zoo")
    names = ["omnimoe.zoo", *(found.name for found in pkgutil.walk_packages(zoo.__path__, "omnimoe.zoo."))]
    for name in names:
        failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert failures == 0, name


def test_the_licence_is_the_one_declared():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
