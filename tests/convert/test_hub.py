"""Published checkpoints by id: the real client of the Hub, against a server of our own."""

from __future__ import annotations

import shutil

import pytest
import torch

from omnimoe import CheckpointError, convert_checkpoint, from_pretrained, load
from tests.hub.conftest import hub  # noqa: F401 - a fixture
from tests.zoo.seeds.tiny import publish, published_model


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """In shards, with a file that nothing needs."""
    folder = publish(published_model("mixtral"), tmp_path_factory.mktemp("mixtral"), max_shard_size="100KB")
    (folder / "consolidated.00.pth").write_bytes(b"a pickle")
    for name in ("tokenizer.model", "LICENSE"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_checkpoint_by_id(hub, mixtral, tmp_path):  # noqa: F811
    hub.add("mistralai/tiny", mixtral)
    model, local = from_pretrained("mistralai/tiny"), from_pretrained(mixtral)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in local.state_dict().items())
    assert "consolidated.00.pth" not in hub.fetched()
    assert load("mistralai/tiny", device="meta").config.published["family"] == "mixtral"
    assert convert_checkpoint("hf-hub:mistralai/tiny", tmp_path / "ours").family == "mixtral"
    assert "consolidated.00.pth" not in hub.fetched()
    for name in ("tokenizer.model", "LICENSE"):
        assert (tmp_path / "ours" / name).read_bytes() == name.encode()
    again = from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in local.state_dict().items())


def test_the_licence_of_a_published_model_is_known_by_its_id(hub, mixtral, tmp_path):  # noqa: F811
    """Where its card says nothing; what it says counts."""
    hub.add("mistralai/Mixtral-8x7B-v0.1", mixtral)
    hub.add("mistralai/of-somebody", mixtral)
    found = from_pretrained("mistralai/Mixtral-8x7B-v0.1").config.card
    assert found == {"license": "apache-2.0", "paper": "https://arxiv.org/abs/2401.04088"}
    assert getattr(from_pretrained("mistralai/of-somebody").config, "card", None) is None
    folder = shutil.copytree(mixtral, tmp_path / "told")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mnpl\n---\n")
    hub.add("mistralai/Mixtral-8x22B-v0.1", folder)
    found = from_pretrained("mistralai/Mixtral-8x22B-v0.1").config.card
    assert (found["license"], found["license_name"]) == ("other", "mnpl")


def test_a_shard_that_was_not_uploaded(hub, mixtral, tmp_path):  # noqa: F811
    folder = tmp_path / "partial"
    folder.mkdir()
    for path in mixtral.iterdir():
        if not path.name.startswith("model-00002"):
            (folder / path.name).write_bytes(path.read_bytes())
    hub.add("mistralai/partial", folder)
    with pytest.raises(CheckpointError, match=r"'mistralai/partial' has no model-00002"):
        from_pretrained("mistralai/partial")
