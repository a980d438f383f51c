"""Every example runs as it stands, and what it registers is short."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

import omnimoe.hub  # noqa: F401 - the zoo is in the table of models before an example is
from omnimoe.encoders.efficientnet import WEIGHTS as EFFICIENTNET
from omnimoe.experts.base import EXPERTS
from omnimoe.layers.attention import ATTENTIONS
from omnimoe.modalities import MODALITIES
from omnimoe.model import MODELS
from omnimoe.routers.base import ROUTERS

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
PARTS = ["new_attention", "new_expert", "new_modality", "new_model", "new_router"]
TRAINED = [*PARTS, "plain_loop", "hf_trainer", "accelerate_loop", "lora", "load_and_inspect", "encoder_inputs"]
NEEDED = {"hf_trainer": "accelerate", "accelerate_loop": "accelerate", "lora": "peft"}
TABLES = (ATTENTIONS, EXPERTS, MODALITIES, MODELS, ROUTERS)


@pytest.fixture
def _forgotten():
    """Takes what an example registers out of the tables again."""
    before = [set(table.names()) for table in TABLES]
    yield
    for table, names in zip(TABLES, before, strict=True):
        for name in set(table.names()) - names:
            table.remove(name)


def registered_parts(name: str) -> list[ast.ClassDef | ast.FunctionDef]:
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    return [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("register_") for decorator in node.decorator_list)
    ]


def test_every_kind_of_part_has_an_example():
    assert set(PARTS) < set(EXAMPLES)
    assert {*TRAINED, "generate"} == set(EXAMPLES)


@pytest.mark.parametrize("name", PARTS)
def test_what_is_registered_is_shorter_than_fifteen_lines(name):
    parts = registered_parts(name)
    assert len(parts) == 1
    lines = parts[0].end_lineno - parts[0].decorator_list[0].lineno + 1
    assert lines < 15, f"{name} registers {lines} lines"
    assert ast.get_docstring(parts[0])


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("name", TRAINED)
def test_it_runs(name, monkeypatch, capsys, tmp_path):
    if name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None:
        pytest.skip(f"{NEEDED[name]} is not installed")
    if name == "encoder_inputs" and not (EFFICIENTNET.is_installed() and importlib.util.find_spec("timm")):
        pytest.skip("the extra `encoders` is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--steps", "2"])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert re.search(r"\d\.\d{2}", told)
    assert not re.search(r"(?<!\w)nan(?!\w)", told)
    assert list(tmp_path.iterdir()) == []


def test_the_model_that_ships_generates_in_every_direction(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["generate", "--out", str(tmp_path)])
    runpy.run_path(str(FOLDER / "generate.py"), run_name="__main__")
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told] == [
        *["text -> image"] * 4, "text -> speech", "image -> text", "speech -> text", "image -> speech",
        "speech -> image", "continued by",
    ]  # fmt: skip
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {*(f"picture_{number}.png" for number in range(1, 5)), "spoken.wav", "described.wav", "seen.png"}


@pytest.mark.parametrize("example", NEEDED)
def test_an_example_says_what_to_install(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", [example])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == NEEDED[example] else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit, match=r"pip install (accelerate|'omnimoe\[(trainer|peft)\]')"):
        runpy.run_path(str(FOLDER / f"{example}.py"), run_name="__main__")


def blocks(page: str) -> list[str]:
    text = (FOLDER.parent / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_code_of_the_pages_is_that_of_the_examples():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    shown = blocks("extending.md") + [block for block in blocks("training.md") if block.startswith("    ")]
    assert len(shown) > 5
    assert [block for block in shown if block not in sources] == []


def test_code_of_the_page_on_training_runs_from_top_to_bottom(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("training.md"):
        if not block.startswith("    "):
            exec(compile(block, "docs/training.md", "exec"), names)  # noqa: S102 - our own page
    assert "[0, 2, 4]" in capsys.readouterr().out
    assert (tmp_path / "second" / "checkpoint" / "training.json").is_file()
