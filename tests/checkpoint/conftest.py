from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from omnimoe.model import OmniMoeForCausalLM
from tests.checkpoint.files import load, small
from tests.declarations import build
from tests.refusals import tables


@pytest.fixture(scope="session")
def model() -> OmniMoeForCausalLM:
    return build(small())


@pytest.fixture(scope="session")
def newer() -> OmniMoeForCausalLM:
    """Another model of the same shape, to save over the first."""
    return build(small(), seed=7)


@pytest.fixture(scope="session")
def originals(model, tmp_path_factory) -> Path:
    """The model in one file and in shards; every test gets a copy."""
    folder = tmp_path_factory.mktemp("originals")
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "shards", max_shard_size="12KB")
    # what a first load imports is imported here, and not in each child again
    load(folder / "one")
    tables()
    return folder


@pytest.fixture
def saved(originals, tmp_path) -> Path:
    """A checkpoint of one file."""
    return Path(shutil.copytree(originals / "one", tmp_path / "saved"))


@pytest.fixture
def sharded(originals, tmp_path) -> Path:
    """The same checkpoint in shards."""
    return Path(shutil.copytree(originals / "shards", tmp_path / "sharded"))
