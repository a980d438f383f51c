"""A router of one's own, fifteen lines in a file, trains, is plotted and is compared by the commands that ours are."""

from __future__ import annotations

import json

import pytest

from omnimoe.cli import main
from omnimoe.model import MODELS
from omnimoe.plugins import load_file
from omnimoe.routers import ROUTERS

ROUTER = """\
@register_router("own_directions")
class OwnDirections(Router):
    def __init__(self, config, *, hidden_size, num_experts, num_modalities):
        super().__init__()
        self.directions = nn.Parameter(torch.randn(num_experts, hidden_size))

    def forward(self, x, rows):
        logits = 10 * F.linear(F.normalize(x), F.normalize(self.directions)).float()
        weights, expert_ids = logits.softmax(-1).topk(2)
        token_index = torch.arange(len(x), device=x.device).repeat_interleave(2)
        losses = {"balance": 0.01 * load_balance_loss(logits.softmax(-1), expert_ids.flatten(), top_k=2)}
        return Routing(token_index, expert_ids.flatten(), weights.flatten().to(x.dtype), logits, losses)
"""
FILE = f'''\
import torch
import torch.nn.functional as F
from torch import nn

from omnimoe import RoutedExperts, Router, Routing, register_model, register_router
from omnimoe.routers import load_balance_loss
from omnimoe.zoo.nano import dense_pico


{ROUTER}

@register_model("own_pico")
def own_pico():
    """Two of four half-width experts, by direction."""
    experts = RoutedExperts.Config(num_experts=4, intermediate_size=128, router=OwnDirections.Config())
    return dense_pico().replace(experts=experts)
'''
SHORT = ["--steps", "2", "--batch-size", "1", "--sequence-length", "128", "--warmup", "1", "--precision", "fp32"]
SHORT += ["--evaluate-every", "1", "--evaluate-batches", "1"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_router.py"
    path.write_text(FILE)
    yield path
    MODELS.remove("own_pico")
    ROUTERS.remove("own_directions")


def test_it_trains_is_plotted_and_is_compared_by_the_same_commands(file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert len([line for line in ROUTER.splitlines() if line.strip()]) <= 15
    parts = ["--parts", str(file)]
    assert main(["info", "own_pico", *parts, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "own_pico"
    assert main(["train", "own_pico", *parts, "--out", str(tmp_path / "run"), *SHORT, "--log-routing"]) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (last,) = (event for event in events if event["kind"] == "routing" and event["step"] == 2)
    assert last["experts_per_token"] == 2
    capsys.readouterr()
    out = tmp_path / "compared"
    command = ["compare", "dense", "moe", "own", "--size", "pico", *parts, "--seeds", "1", "--out", str(out), *SHORT]
    assert main(command) == 0
    assert "own_pico" in capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["dense_pico", "moe_pico", "own_pico"]
    assert (out / "routing-own_pico.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "curves.png").is_file()
    monkeypatch.setattr("omnimoe.train.Training.run", lambda *_, **__: pytest.fail("it was trained again"))
    capsys.readouterr()
    assert main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]


def test_a_file_is_imported_once(file):
    assert load_file(file) == load_file(str(file))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is no Python file that could be imported"),
        ("import nowhere_to_be_found", "could not be imported, ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "could not be imported, SystemExit: 3"),
        ("def broken(:", "could not be imported, SyntaxError"),
    ],
)
def test_a_file_that_fails_is_named(tmp_path, capsys, text, told):
    path = tmp_path / "parts.py"
    if text is not None:
        path.write_text(text)
    assert main(["list", "--parts", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path} {told}" in error
    assert error.count("\n") == 1
