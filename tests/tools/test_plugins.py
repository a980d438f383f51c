"""Packages of somebody else's: installed beside omnimoe, found by name, and harmless where they are broken.

Everything runs in one child process that has never heard of the packages; what it saw comes back as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

TINY = '''
from dataclasses import dataclass

import torch
from torch import nn

from omnimoe import (
    Experts, Modality, OmniMoeConfig, RoutedExperts, Router, Routing, Tokens, register_experts, register_modality,
    register_model, register_router,
)


@register_router("plugged_router")
class EveryOther(Router):
    """Row i goes to expert i mod E."""

    def __init__(self, config, *, hidden_size, num_experts, num_modalities):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x, rows):
        index = torch.arange(len(x), device=x.device)
        return Routing(index, index % self.num_experts, x.new_ones(len(x)))


@register_experts("plugged_experts")
class Scaled(Experts):
    """Other experts, times a number that is learned."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Experts.Config):
        inner: Experts.Config = RoutedExperts.Config(num_experts=2, intermediate_size=8, router=EveryOther.Config())

    def __init__(self, config, **sizes):
        super().__init__()
        self.inner, self.scale = config.inner.build(**sizes), nn.Parameter(torch.ones(()))

    def forward(self, x, rows):
        y, routing = self.inner(x, rows)
        return self.scale * y, routing


@register_modality("plugged_modality")
class Numbers(Modality):
    """A row is a number."""

    def __init__(self, config, *, hidden_size):
        super().__init__()
        self.enter, self.leave = nn.Linear(1, hidden_size), nn.Linear(hidden_size, 1)

    def embed(self, inputs, timesteps=None):
        return self.enter(inputs)

    def head(self, x):
        return self.leave(x)


@register_model("plugged_model")
def plugged_model():
    """A model that a plugin declares."""
    return OmniMoeConfig(
        hidden_size=16,
        num_layers=1,
        modalities=(Tokens.Config(name="text", vocab_size=16), Numbers.Config(name="number", placeholder_id=3)),
        experts=Scaled.Config(),
    )
'''

BROKEN = {
    "absent": ("no_such_module", None),
    "raises": ("raising_plugin", "raise RuntimeError('its licence has expired')"),
    "leaves": ("leaving_plugin", "import sys\nsys.exit(3)"),
    "syntax": ("misspelt_plugin", "def plugin(:"),
    "taken": (
        "taking_plugin",
        "from omnimoe import register_router\nfrom omnimoe.routers import Router\n"
        "@register_router('top_k')\nclass Mine(Router):\n    pass",
    ),
    "malformed": ("shouting_plugin", "from omnimoe import register_model\nregister_model('Loud Model')(lambda: None)"),
    "attribute": ("empty_plugin:nothing", ""),
}

CHILD = """
import contextlib, io, json, logging, sys
logged = io.StringIO()
logging.basicConfig(stream=logged, level=logging.WARNING)
from omnimoe.routers import ROUTERS

seen = {"router": ROUTERS.get("plugged_router").__module__, "hub": "omnimoe.hub" in sys.modules}
from omnimoe.experts import EXPERTS
from omnimoe.modalities import MODALITIES

seen["names"] = ["plugged_experts" in EXPERTS.names(), "plugged_modality" in MODALITIES.names()]
import torch
from omnimoe import from_pretrained, list_models, load, model_info
from omnimoe.cli import main

seen["listed"] = "plugged_model" in list_models()
seen["family"] = model_info("plugged_model").family
model = load("plugged_model", seed=0).eval()
ids = torch.tensor([[1, 5, 3, 9]])
inputs = {"input_ids": ids, "features": {"number": torch.ones(1, 1)}}
out = model(**inputs, labels=ids)
seen["loss"] = out.loss.item()
seen["prediction"] = list(out.predictions["number"].shape)
model.save_pretrained(sys.argv[1])
seen["read back"] = torch.equal(from_pretrained(sys.argv[1])(**inputs).logits, out.logits)
seen["built in"] = ROUTERS.get("top_k").__module__


def told(*command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(command)
    return code, out.getvalue()


seen["list"] = told("list", "plugged*")
seen["doctor"] = told("doctor", "--json")
seen["doctor text"] = told("doctor")
seen["warnings"] = logged.getvalue()
print(json.dumps(seen))
"""


def install(folder, package, version, entry_points, sources):
    """What an installer leaves behind: modules, and a dist-info folder with metadata."""
    told = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
    (told / "entry_points.txt").write_text(f"[omnimoe.plugins]\n{lines}")
    (told / "RECORD").write_text("".join(f"{name}.py,,\n" for name in sources))
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    broken = {value.partition(":")[0]: source for value, source in BROKEN.values() if source is not None}
    # the broken ones come first by name, so that what follows them must still be loaded
    install(folder, "a-broken-package", "0.1", {name: value for name, (value, _) in BROKEN.items()}, broken)
    install(folder, "tiny-plugin", "1.2", {"tiny": "tiny_plugin"}, {"tiny_plugin": TINY})
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-c", CHILD, str(tmp_path_factory.mktemp("saved"))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_parts_are_found_by_name_before_anything_is_imported(seen):
    assert seen["router"] == "tiny_plugin"
    assert not seen["hub"]
    assert seen["names"] == [True, True]


def test_a_model_of_plugged_parts_is_one_like_others(seen):
    assert seen["listed"]
    assert seen["family"] == "custom"
    assert 0 < seen["loss"] < 20
    assert seen["prediction"] == [1, 1]
    assert seen["read back"]


def test_the_list_shows_it(seen):
    code, told = seen["list"]
    assert code == 0
    assert "plugged_model" in told
    assert "text, number" in told


def test_the_doctor_lists_plugins(seen):
    code, told = seen["doctor"]
    plugins = {plugin["name"]: plugin for plugin in json.loads(told)["plugins"]}
    assert code == 0
    assert plugins["tiny"] == {"name": "tiny", "value": "tiny_plugin", "package": "tiny-plugin 1.2", "error": ""}
    assert set(plugins) >= {"tiny", *BROKEN}
    text = seen["doctor text"][1]
    assert "tiny-plugin 1.2: loaded" in text
    assert "a-broken-package 0.1: RuntimeError: its licence has expired" in text


@pytest.mark.hazard(30)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raises", "RuntimeError: its licence has expired"),
        ("leaves", "SystemExit: 3"),
        ("syntax", "SyntaxError: "),
        ("taken", "RegistryError: router 'top_k' is already registered as omnimoe.routers.top_k.TopKRouter"),
        ("malformed", "RegistryError: model name 'Loud Model' may only hold lower-case letters"),
        ("attribute", "AttributeError: module 'empty_plugin' has no attribute 'nothing'"),
    ],
)
def test_a_broken_plugin_is_reported_and_not_fatal(seen, name, message):
    (plugin,) = (plugin for plugin in json.loads(seen["doctor"][1])["plugins"] if plugin["name"] == name)
    assert plugin["error"].startswith(message)
    assert plugin["package"] == "a-broken-package 0.1"
    assert seen["warnings"].count(f"the plugin '{name}' ({BROKEN[name][0]}) failed to load") == 1
    assert seen["built in"] == "omnimoe.routers.top_k"
