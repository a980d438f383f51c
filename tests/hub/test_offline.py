"""Work without network: on a warm cache nothing is asked, and what is missing is said."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from omnimoe import from_pretrained, load
from tests.hub.cache import cache
from tests.hub.conftest import same
from tests.hub.test_refusals import not_loaded
from tests.refusals import unchanged

NAME = "org/tiny"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.hazard(31)


@pytest.fixture
def no_sockets(monkeypatch):
    """Any attempt to reach anything fails the test."""

    def refuse(*args, **given):
        raise AssertionError(f"something reached for the network: {args[1:]}")

    def block():
        for name in ("connect", "connect_ex"):
            monkeypatch.setattr(socket.socket, name, refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    return block


@pytest.fixture
def fetched(hub, sharded):
    """A model that was fetched before."""
    repository = hub.add(NAME, sharded)
    repository.tags["v1"] = repository.branches["main"]
    from_pretrained(NAME)
    from_pretrained(NAME, revision="v1")
    return repository.branches["main"]


@pytest.mark.parametrize("given", [{}, {"revision": "v1"}, {"towers": ["text"]}], ids=str)
def test_offline_mode_with_sockets_blocked(fetched, model, no_sockets, monkeypatch, given):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    no_sockets()
    with unchanged(cache()):
        found = from_pretrained(NAME, **given)
    assert "towers" in given or same(found, model)
    assert load(f"hf-hub:{NAME}", num_layers=1).config.num_layers == 1


def test_local_files_only_with_sockets_blocked(fetched, model, no_sockets):
    no_sockets()
    with unchanged(cache()):
        found = from_pretrained(NAME, local_files_only=True)
    assert same(found, model)


def test_a_commit_needs_no_network_at_all(fetched, model, no_sockets):
    no_sockets()
    with unchanged(cache()):
        found = from_pretrained(NAME, revision=fetched)
    assert same(found, model)


def test_a_hub_that_is_down_and_a_warm_cache(fetched, model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with unchanged(cache()):
        found = from_pretrained(NAME)
    assert same(found, model)


@pytest.mark.parametrize(
    ("is_offline", "given", "fragment"),
    [
        (True, {}, "HF_HUB_OFFLINE forbids the network"),
        (False, {"local_files_only": True}, "local_files_only=True forbids the network"),
    ],
)
def test_what_is_not_in_the_cache(hub, saved, no_sockets, monkeypatch, is_offline, given, fragment):
    hub.add(NAME, saved)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    no_sockets()
    not_loaded(f"'{NAME}' is not in the cache", fragment, "fetch it once with network", **given)


def test_a_revision_that_is_not_in_the_cache(fetched, no_sockets):
    no_sockets()
    not_loaded("'org/tiny' at revision 'next' is not in the cache", revision="next", local_files_only=True)


def test_a_part_that_is_not_in_the_cache(hub, patches, no_sockets):
    hub.add(NAME, patches)
    from_pretrained(NAME, without=["latent"])
    no_sockets()
    from_pretrained(NAME, without=["latent"], local_files_only=True)
    not_loaded("only a part of 'org/tiny' is in the cache, and local_files_only=True", local_files_only=True)


CHILD = """
import json, os, sys
from omnimoe import from_pretrained, list_models, load, model_info, register_model
import omnimoe.hub
from omnimoe.zoo.card import Card
name = sys.argv[1]
told = {"keys": len(from_pretrained(name).state_dict())}

@register_model("published")
def published():
    "A model whose weights lie on the Hub."
    return omnimoe.hub._config_at(name)

CARD = Card(family="own", title="", paper="https://example.org", license="MIT", weights={"published": f"hf-hub:{name}"})
told["listed"] = "published" in list_models(pretrained=True)
told["weights"] = model_info("published").pretrained
told["license"] = load("published", pretrained=True).config.card["license"]
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_program_of_its_own_with_the_variables_of_the_environment(hub, saved, model, tmp_path):
    """The client as a user has it: nothing patched, HF_ENDPOINT and HF_HUB_OFFLINE as they are documented."""
    hub.add(NAME, saved)
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(*before: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [*before, sys.executable, "-c", CHILD, NAME]
        environment = kept | variables | more
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told == {"keys": len(model.state_dict()), "listed": True, "weights": f"hf-hub:{NAME}", "license": "mit"}
    assert "it/s" not in first.stderr + first.stdout, "bars are for terminals"
    assert hub.fetched() >= {"model.safetensors"}
    hub.requests.clear()
    alone = ["unshare", "--user", "--net"]
    has_none = shutil.which("unshare") and subprocess.run([*alone, "true"], check=False).returncode == 0
    with unchanged(tmp_path):
        again = run(*(alone if has_none else []), HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == told
    assert hub.requests == []
    shutil.rmtree(tmp_path / "cache")
    with unchanged(tmp_path):
        cold = run(HF_HUB_OFFLINE="1")
    assert cold.returncode == 1
    assert "CheckpointError" in cold.stderr
    assert "HF_HUB_OFFLINE forbids the network" in cold.stderr
