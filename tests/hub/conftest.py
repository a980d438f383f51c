"""A Hub of our own for the tests of this folder, and huggingface_hub pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM
from tests.declarations import DECLARATIONS, MOT, build
from tests.hub.server import FakeHub, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub without repositories; downloads go to a cache of this test's own."""
    with serving() as found:
        for name, value in {
            "ENDPOINT": found.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "no-tokens"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        # the clients that a Trainer calls: huggingface_hub's own, and one that newer transformers keep
        monkeypatch.setattr(hf_api.api, "endpoint", found.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        close_session()
        yield found
        close_session()


@pytest.fixture(scope="session")
def config() -> OmniMoeConfig:
    """Three modalities with a tower each."""
    return MOT.replace(tie_word_embeddings=False)


@pytest.fixture(scope="session")
def model(config: OmniMoeConfig) -> OmniMoeForCausalLM:
    """A model whose every weight is random."""
    return build(config)


@pytest.fixture(scope="session")
def saved(model: OmniMoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, in one file."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded(model: OmniMoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, in many files."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model.save_pretrained(folder, max_shard_size="6KB")
    return folder


@pytest.fixture(scope="session")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a continuous modality, every weight in a file of its own."""
    folder = tmp_path_factory.mktemp("patches") / "model"
    build(DECLARATIONS["transfusion"]).save_pretrained(folder, max_shard_size=1)
    return folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models hold the same weights under the same names."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
