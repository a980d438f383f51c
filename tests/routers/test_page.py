"""The page on routers: its code runs in order, and every router, field and setting on it exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import omnimoe.routers as routers
from omnimoe import OmniMoeForCausalLM
from omnimoe.backbone import LayerRange
from omnimoe.compare import compare
from omnimoe.data import Corpus
from omnimoe.experts import FeedForward, RoutedAttention, RoutedExperts, RoutedStateSpace
from omnimoe.model import MODELS
from omnimoe.routers import ROUTERS, DepthRouter, HashRouter, TopKRouter
from omnimoe.routers.balance import BalanceConfig
from omnimoe.train import TrainSettings
from tests.train.runs import settings, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "routers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's code leaves behind, run from top to bottom in a folder of its own."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("page")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/routers.md", "exec"), names)  # noqa: S102 - our own page
    yield names | {"folder": folder}
    patch.undo()
    ROUTERS.remove("two_directions")


def test_the_code_runs_and_draws(page):
    assert (page["folder"] / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert all(layer.experts_per_token == 2 for layer in page["trace"].layers())


def test_a_router_of_ones_own_is_short_and_is_trained_and_compared(page):
    block = next(found for found in BLOCKS if "@register_router" in found)
    body = block[block.index("@register_router") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15
    router = page["TwoDirections"].Config()
    configs = {
        "page_dense": tiny(),
        "page_own": tiny().replace(experts=RoutedExperts.Config(num_experts=4, intermediate_size=48, router=router)),
    }
    for name, config in configs.items():
        MODELS.register(name)(lambda config=config: config)
    try:
        found = compare(list(configs), settings(steps=4), corpus=Corpus.load("p"), show_progress=False)
    finally:
        for name in configs:
            MODELS.remove(name)
    assert [len(found.histories[name][0].steps) for name in configs] == [3, 3]
    assert "page_own" in found.names


def test_every_router_and_field_is_on_the_page():
    for name in ROUTERS.names():
        if ROUTERS.get(name).__module__.startswith("omnimoe."):
            assert ROUTERS.get(name).__name__ in PAGE, name
    fields = {field.name for config in (BalanceConfig, TopKRouter.Config) for field in dataclasses.fields(config)}
    told_elsewhere = {"entropy_keys", "expert_bias_target", "input_jitter"}
    assert {name for name in fields - told_elsewhere if name not in PAGE} == set()


def test_every_setting_on_the_page_exists():
    """Those written ``field=value``."""
    configs = [ROUTERS.get(name).Config for name in ROUTERS.names()]
    configs += [
        RoutedExperts.Config,
        RoutedAttention.Config,
        RoutedStateSpace.Config,
        DepthRouter.Config,
        TrainSettings,
    ]
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    known |= {"attention", "step", "depth", "by", "path", "use_cache", "router", "towers", "router_aux_loss_coef"}
    quoted = " ".join(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))
    assert set(re.findall(r"(\w+)=(?!=)", quoted)) <= known


def test_what_the_table_writes_can_be_made():
    """Every ``XConfig(...)`` of the table, and every list of settings beside one."""
    names = {
        **vars(routers),
        **{part.__name__: part for part in (RoutedExperts, RoutedAttention, FeedForward, LayerRange)},
    }
    names |= {"vocab_size": 20, "E": 8}
    section = PAGE[PAGE.index("## Which router is which") : PAGE.index("## Beside the bank")]
    table = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    written = [code for cell in table for code in re.findall(r"`([^`]+)`", cell) if "..." not in code]
    made = 0
    for code in written:
        if re.match(r"\w+(\.Config)?\(", code):
            eval(code, names)  # noqa: S307 - our own page
        elif re.match(r"\w+=", code):
            given = eval(f"dict({code})", names)  # noqa: S307
            of_a_table = {"num_ids": 1} if given.keys() & {"num_ids", "is_learned"} else {}
            for kind, needed in ((HashRouter if of_a_table else TopKRouter, of_a_table), (RoutedExperts, {})):
                known = {field.name for field in dataclasses.fields(kind.Config)}
                own = {name: value for name, value in given.items() if name in known}
                kind.Config(**{**needed, **own})
        else:
            continue
        made += 1
    assert made >= 30


def test_the_models_of_the_page_are_models(page):
    assert isinstance(page["model"], OmniMoeForCausalLM)
    moved = {name for name, parameter in page["moma"].named_parameters() if parameter.grad is not None}
    assert moved
    assert all("auxiliary" in name for name in moved)
