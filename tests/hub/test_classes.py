"""The classes of transformers by an id: every file is checked here too, and adapters bring the base they name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from omnimoe import CheckpointError, OmniMoeForCausalLM, from_pretrained
from tests.hub.conftest import same

NAME, ADAPTERS = "org/tiny", "org/adapters"
KINDS = [OmniMoeForCausalLM, AutoModelForCausalLM]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_called_what_it_was_asked_for(hub, saved, model, kind):
    hub.add(NAME, saved)
    loaded = kind.from_pretrained(NAME, verify=True)
    assert same(loaded, model)
    assert loaded.name_or_path == loaded.config.name_or_path == NAME


def test_it_is_fetched_again_where_that_is_asked(hub, saved, model):
    hub.add(NAME, saved)
    OmniMoeForCausalLM.from_pretrained(NAME)
    hub.requests.clear()
    assert same(OmniMoeForCausalLM.from_pretrained(NAME, force_download=True), model)
    assert hub.fetched() >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_malformed_upload_is_refused(hub, saved, tmp_path, kind):
    folder = shutil.copytree(saved, tmp_path / "upload")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    hub.add(NAME, folder)
    with pytest.raises(CheckpointError, match="a git-lfs pointer"):
        kind.from_pretrained(NAME)


@pytest.fixture
def adapted(hub, saved, tmp_path):
    """A model with adapters that do something, and the repository of these."""
    peft = pytest.importorskip("peft")
    hub.add(NAME, saved)
    model = OmniMoeForCausalLM.from_pretrained(NAME)
    model.add_adapter(peft.LoraConfig(target_parameters=["experts.down_proj"], target_modules=[], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapters")
    hub.add(ADAPTERS, tmp_path / "adapters")
    return model.eval()


def answers_alike(one, other) -> bool:
    ids = torch.randint(0, other.config.vocab_size, (1, 8))
    return torch.equal(one.eval()(ids).logits, other(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_bring_their_base(adapted, kind):
    assert answers_alike(kind.from_pretrained(ADAPTERS), adapted)


def test_adapters_name_the_revision_of_their_base(hub, adapted, saved, tmp_path):
    first = hub.repositories[NAME].find("main")
    hub.repositories[NAME].commit({"README.md": b"the model is gone"})
    with pytest.raises(CheckpointError, match=r"'org/tiny' has no model\.safetensors"):
        OmniMoeForCausalLM.from_pretrained(ADAPTERS, force_download=True)
    file = tmp_path / "adapters" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": first}))
    hub.add(ADAPTERS, tmp_path / "adapters")
    assert answers_alike(OmniMoeForCausalLM.from_pretrained(ADAPTERS), adapted)


def test_the_base_is_asked_for_as_its_adapters_are(hub, adapted, saved, tmp_path):
    """With the same token, in the same cache, and not at all without network."""
    for name in (NAME, ADAPTERS):
        hub.repositories[name].is_private = True
    hub.tokens["good"] = {NAME, ADAPTERS}
    given = {"token": "good", "cache_dir": tmp_path / "other"}
    for kind in (from_pretrained, OmniMoeForCausalLM.from_pretrained):
        assert answers_alike(kind(ADAPTERS, **given), adapted)
        hub.requests.clear()
        assert answers_alike(kind(ADAPTERS, **given, local_files_only=True), adapted)
        assert hub.requests == []
        with pytest.raises(CheckpointError, match="there is no repository 'org/adapters'"):
            kind(ADAPTERS, cache_dir=tmp_path / "third")


class TestLoadAdapter:
    """``model.load_adapter`` by an id: fetched by us, so that the same checks hold as for models."""

    def test_by_an_id(self, hub, adapted, saved):
        hub.requests.clear()
        model = OmniMoeForCausalLM.from_pretrained(saved)
        model.load_adapter(ADAPTERS)
        assert answers_alike(model, adapted)
        assert hub.fetched() >= {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
        hub.requests.clear()
        again = OmniMoeForCausalLM.from_pretrained(saved)
        again.load_adapter(f"hf-hub:{ADAPTERS}", local_files_only=True)
        assert answers_alike(again, adapted)
        assert hub.requests == []

    def test_at_a_revision_with_a_token_in_a_subfolder(self, hub, adapted, saved, tmp_path):
        upload = shutil.copytree(tmp_path / "adapters", tmp_path / "upload" / "steps" / "9").parents[1]
        repository = hub.add("org/private", upload, is_private=True)
        repository.tags["v1"] = repository.branches["main"]
        repository.commit({"README.md": b"gone"})
        hub.tokens["good"] = {"org/private"}
        model = OmniMoeForCausalLM.from_pretrained(saved)
        with pytest.raises(CheckpointError, match="there is no repository 'org/private'"):
            model.load_adapter("org/private")
        model.load_adapter("org/private", adapter_kwargs={"revision": "v1", "token": "good", "subfolder": "steps/9"})
        assert answers_alike(model, adapted)

    @pytest.mark.parametrize("kind", ["cut", "pickle", "of another model", "no adapters", "nothing"])
    def test_what_is_malformed_is_refused(self, hub, adapted, saved, tmp_path, kind):
        upload = shutil.copytree(tmp_path / "adapters", tmp_path / "upload")
        file = upload / "adapter_model.safetensors"
        fragment = {
            "cut": "is cut off",
            "pickle": "has no adapter_model.safetensors at revision 'main'",
            "of another model": "1 unexpected:",
            "no adapters": "holds no adapters: it has no adapter_config.json",
            "nothing": "there is no repository 'org/nothing'",
        }[kind]
        if kind == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        elif kind == "pickle":
            torch.save(load_file(file), upload / "adapter_model.bin")
            file.unlink()
        elif kind == "of another model":
            save_file({**load_file(file), "base_model.model.other": torch.ones(1)}, file)
        if kind != "nothing":
            hub.add("org/nothing", saved if kind == "no adapters" else upload)
        model = OmniMoeForCausalLM.from_pretrained(saved)
        with pytest.raises(CheckpointError) as caught:
            model.load_adapter("org/nothing")
        assert fragment in str(caught.value)
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert "adapter_model.bin" not in hub.fetched()
