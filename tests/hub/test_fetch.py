"""Models from the Hub: what is asked, what is fetched, and which of two places of one name is read."""

from __future__ import annotations

import json
import logging
import shutil
import sys

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from omnimoe import OmniMoeForCausalLM, from_pretrained, list_models, load, model_info, register_model
from omnimoe.checkpoint import Hub, Source
from omnimoe.model import MODELS
from tests.hub.conftest import same
from tests.hub.server import Fault
from tests.refusals import unchanged

NAME = "org/tiny"


@pytest.mark.parametrize("form", ["{}", "hf-hub:{}"])
def test_by_id(hub, saved, model, form):
    hub.add(NAME, saved)
    found = from_pretrained(form.format(NAME))
    assert same(found, model)
    assert not found.training
    assert found.name_or_path == from_pretrained(NAME, towers=["text"]).config.name_or_path == NAME
    assert hub.fetched() >= {"config.json", "model.safetensors"}


def test_load_takes_an_id_too(hub, saved, model):
    hub.add(NAME, saved)
    assert same(load(f"hf-hub:{NAME}", pretrained=True), model)
    hub.requests.clear()
    fresh = load(NAME, seed=0, num_layers=1)
    assert (fresh.training, fresh.config.num_layers) == (True, 1)
    assert "model.safetensors" not in hub.fetched()


def test_only_what_is_read_is_fetched(hub, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "upload")
    for name in ("pytorch_model.bin", "modeling.py", "optimizer.safetensors", "step-1/model.safetensors", "log.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    hub.add(NAME, folder)
    from_pretrained(NAME)
    assert hub.fetched() == {path.name for path in saved.iterdir()}


def test_in_shards(hub, sharded, model):
    hub.add(NAME, sharded)
    assert same(from_pretrained(NAME, verify=True), model)
    assert len([name for name in hub.fetched() if name.endswith(".safetensors")]) > 3


def test_a_branch_a_tag_and_a_commit(hub, saved, sharded):
    repository = hub.add(NAME, saved)
    first = repository.find("main")
    repository.tags["v1"] = first
    hub.add(NAME, sharded)
    repository.branches["next"] = repository.branches["main"]
    for revision, count in (("v1", 1), (first, 1), ("next", None), (None, None)):
        hub.requests.clear()
        from_pretrained(NAME, revision=revision)
        if count:
            assert not [name for name in hub.fetched() if "-of-" in name]


def test_all_files_are_of_one_commit(hub, saved, sharded, monkeypatch):
    """A push between the config and the weights is not seen."""
    repository = hub.add(NAME, saved)
    first = repository.find("main")
    hub.add(NAME, sharded)
    last, repository.branches["main"] = repository.branches["main"], first
    from omnimoe.checkpoint import Source

    fetch = Source.fetch

    def fetch_and_push(self, *args, **given):
        folder = fetch(self, *args, **given)
        repository.branches["main"] = last
        return folder

    monkeypatch.setattr(Source, "fetch", fetch_and_push)
    from_pretrained(NAME)
    assert "model.safetensors" in hub.fetched()
    assert not [name for name in hub.fetched() if "-of-" in name]


def test_a_subfolder(hub, saved, model, tmp_path):
    shutil.copytree(saved, tmp_path / "upload" / "steps" / "100")
    hub.add(NAME, tmp_path / "upload")
    assert same(from_pretrained(NAME, subfolder="steps/100"), model)
    assert same(from_pretrained(tmp_path / "upload", subfolder="steps/100"), model)
    assert same(load(NAME, pretrained=True, subfolder="steps/100"), model)


def test_a_private_repository_with_a_token(hub, saved, model):
    hub.add(NAME, saved, is_private=True)
    hub.tokens["good"] = {NAME}
    assert same(from_pretrained(NAME, token="good"), model)


def test_a_gated_repository_with_a_token(hub, saved, model, tmp_path, monkeypatch):
    hub.add(NAME, saved, is_gated=True)
    hub.tokens["good"] = {NAME}
    monkeypatch.setenv("HF_TOKEN", "good")
    assert same(from_pretrained(NAME, cache_dir=tmp_path / "other"), model)
    assert Source(name=NAME, is_folder=False, hub=Hub(cache_dir=tmp_path / "other")).is_in_cache()
    assert not (tmp_path / "hub-cache").exists()


@pytest.mark.hazard(31)
def test_a_renamed_repository_is_found_and_its_new_name_told(hub, saved, model, caplog):
    hub.add("org/new", saved)
    hub.renamed["org/old"] = "org/new"
    with caplog.at_level(logging.WARNING, logger="omnimoe"), unchanged(saved):
        assert same(from_pretrained("org/old"), model)
    assert "'org/old' is now called 'org/new' on the Hub; write that name" in caplog.text


def test_whether_it_was_renamed_is_no_condition(hub, saved, model):
    hub.add(NAME, saved)
    hub.faults.append(Fault(f"GET /api/models/{NAME}$", status=503))
    assert same(from_pretrained(NAME), model)
    assert hub.faults[0].times < 1000


@pytest.mark.hazard(31)
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_folder_wins_over_an_id(hub, saved, sharded, tmp_path, monkeypatch, caplog, is_cached):
    hub.add(NAME, sharded)
    if is_cached:
        from_pretrained(f"hf-hub:{NAME}")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / NAME)
    hub.requests.clear()
    with caplog.at_level(logging.INFO, logger="omnimoe"), unchanged(tmp_path / NAME, tmp_path / "hub-cache"):
        from_pretrained(NAME)
    assert hub.requests == []
    told = [record.levelname for record in caplog.records if NAME in record.message and "folder" in record.message]
    assert told == ["WARNING" if is_cached else "INFO"]
    from_pretrained(f"hf-hub:{NAME}")
    assert hub.requests != []


def test_a_folder_whose_name_could_be_no_id(saved, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "runs" / "a--b")
    assert same(from_pretrained("runs/a--b"), model)


@pytest.mark.hazard(31)
def test_the_second_time_nothing_is_fetched(hub, saved, model, tmp_path):
    hub.add(NAME, saved)
    from_pretrained(NAME)
    hub.requests.clear()
    with unchanged(tmp_path / "hub-cache"):
        found = from_pretrained(NAME)
    assert same(found, model)
    assert hub.fetched() == set()
    assert len(hub.requests) == 1, "which commit the branch is at now, and no more"


def test_a_new_commit_is_fetched(hub, saved, tmp_path):
    hub.add(NAME, saved)
    from_pretrained(NAME)
    changed = shutil.copytree(saved, tmp_path / "changed")
    plain = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(plain | {"max_position_embeddings": 77}))
    hub.add(NAME, changed)
    hub.requests.clear()
    assert from_pretrained(NAME).config.max_position_embeddings == 77
    assert hub.fetched() == {"config.json"}, "what has not changed is in the cache"


def test_the_cache_is_that_of_huggingface_hub(hub, saved):
    hub.add(NAME, saved)
    from_pretrained(NAME)
    from huggingface_hub import try_to_load_from_cache

    assert try_to_load_from_cache(NAME, "model.safetensors", cache_dir=constants.HF_HUB_CACHE) is not None


def test_weights_of_a_card_that_names_the_hub(hub, saved, model, config, monkeypatch):
    from omnimoe.zoo.card import Card

    hub.add(NAME, saved)

    @register_model("published_tiny")
    def published_tiny():
        """A model of a test."""
        return config

    card = Card(family="own", title="", paper="https://example.org", license="MIT", weights={})
    monkeypatch.setattr(sys.modules[__name__], "CARD", card, raising=False)
    try:
        assert "published_tiny" not in list_models(pretrained=True)
        card.weights["published_tiny"] = f"hf-hub:{NAME}"
        assert "published_tiny" in list_models(pretrained=True, family="own")
        assert model_info("published_tiny").pretrained == f"hf-hub:{NAME}"
        assert hub.requests == [], "no network to list models"
        found = load("published_tiny", pretrained=True, revision="main", dtype="bfloat16")
        assert found.config.card == {"license": "mit", "paper": "https://example.org"}
        assert torch.equal(found.lm_head.weight, model.lm_head.weight.bfloat16())
    finally:
        MODELS.remove("published_tiny")


@pytest.mark.parametrize("kind", [OmniMoeForCausalLM, AutoModelForCausalLM])
def test_by_the_classes_of_transformers(hub, sharded, model, kind):
    hub.add(NAME, sharded)
    assert same(kind.from_pretrained(NAME), model)
    assert AutoConfig.from_pretrained(NAME).modality_names == model.config.modality_names


def test_a_published_model_of_another_library(hub, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    hub.add("org/llama", tmp_path / "llama")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(from_pretrained("org/llama")(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_towers_spread_by_transformers(hub, saved):
    hub.add(NAME, saved)
    spread = from_pretrained(NAME, towers=["text"], device_map={"": "cpu"}, attn_implementation="eager")
    assert {weight.device.type for weight in spread.parameters()} == {"cpu"}
    assert spread.config._attn_implementation == "eager"
