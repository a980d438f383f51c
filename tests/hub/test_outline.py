"""A published model on the meta device: of its weights on the Hub the headers alone are fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from omnimoe import from_pretrained
from omnimoe.checkpoint import CheckpointError
from omnimoe.convert import to_published
from tests.hub.cache import cache
from tests.zoo.cosmos3.tiny import KINDS, make_model

NAME = "org/llama"


@pytest.fixture(scope="module", params=["one file", "shards"])
def published(request, tmp_path_factory) -> Path:
    """A Llama of a quarter of a million weights: a file is longer than what the client asks of its start."""
    folder = tmp_path_factory.mktemp("published") / "llama"
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    size = "5GB" if request.param == "one file" else "300KB"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=size)
    return folder


def weights_in_cache() -> list[Path]:
    return sorted(cache().rglob("*.safetensors"))


def shapes(model: torch.nn.Module) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def test_no_numbers_are_fetched(hub, published):
    hub.add(NAME, published)
    found = from_pretrained(NAME, device="meta")
    assert all(tensor.is_meta for tensor in found.state_dict().values())
    assert found.name_or_path == NAME
    assert not weights_in_cache()
    whole = from_pretrained(NAME)
    assert weights_in_cache()
    assert shapes(found) == shapes(whole)
    assert found.config.to_dict() == whole.config.to_dict()


def test_the_default_device_counts(hub, published):
    hub.add(NAME, published)
    with torch.device("meta"):
        assert next(from_pretrained(NAME).parameters()).is_meta
    assert not weights_in_cache()


def test_what_was_fetched_is_not_asked_for_again(hub, published, monkeypatch):
    hub.add(NAME, published)
    whole = from_pretrained(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert shapes(from_pretrained(NAME, device="meta")) == shapes(whole)
    assert not hub.requests


def test_the_weights_of_a_revision(hub, published, tmp_path):
    """The headers are of the commit that the config is of."""
    repository = hub.add(NAME, published)
    other = json.loads((published / "config.json").read_text()) | {"num_hidden_layers": 2}
    files = {path.name: path.read_bytes() for path in published.iterdir()}
    repository.commit({**files, "config.json": json.dumps(other).encode()}, branch="short")
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        from_pretrained(NAME, revision="short", device="meta")
    assert from_pretrained(NAME, device="meta").config.num_layers == 3
    assert not weights_in_cache()


def test_what_does_not_fit_is_told_before_it_is_fetched(hub, published, tmp_path):
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in published.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        held = load_file(path)
        if "model.norm.weight" in held:
            held["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
        save_file(held, folder / path.name, metadata={"format": "pt"})
    hub.add(NAME, folder)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*65") as refused:
        from_pretrained(NAME, device="meta")
    assert NAME in str(refused.value)
    assert not weights_in_cache()


def test_a_missing_file_and_one_that_is_no_safetensors(hub, published, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in published.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    repository = hub.add(NAME, folder)
    with pytest.raises(CheckpointError, match="has no model.*safetensors at revision 'main'"):
        from_pretrained(NAME, device="meta")
    broken = {path.name: b"<html>sign in</html>" * 20 for path in published.glob("*.safetensors")}
    repository.commit({**{path.name: path.read_bytes() for path in folder.iterdir()}, **broken})
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        from_pretrained(NAME, device="meta")


def test_in_a_subfolder(hub, published, tmp_path):
    below = tmp_path / "upload" / "step-1"
    below.mkdir(parents=True)
    for path in published.iterdir():
        (below / path.name).write_bytes(path.read_bytes())
    hub.add(NAME, tmp_path / "upload")
    assert from_pretrained(NAME, subfolder="step-1", device="meta").config.num_layers == 3
    assert not weights_in_cache()


def test_the_network_that_is_forbidden_is_not_used(hub, published, monkeypatch):
    hub.add(NAME, published)
    from_pretrained(NAME, device="meta")
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="local_files_only=True forbids the network|in the cache"):
        from_pretrained(NAME, device="meta", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids the network|in the cache"):
        from_pretrained(NAME, device="meta")
    assert not hub.requests


def test_weights_in_folders_below(hub, tmp_path):
    """As those of Cosmos3, whose tower of pictures lies beside the transformer."""
    model = make_model(KINDS[0])
    to_published(model, tmp_path / "cosmos3")
    hub.add(NAME, tmp_path / "cosmos3")
    found = from_pretrained(NAME, device="meta")
    assert shapes(found) == shapes(model)
    assert not weights_in_cache()
