"""The classes of transformers by an id: every file is checked here too, and adapters bring the base they name."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import CheckpointError, OmniMoeForCausalLM
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


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_bring_their_base(hub, saved, tmp_path, kind):
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
    loaded = kind.from_pretrained(ADAPTERS)
    ids = torch.randint(0, model.config.vocab_size, (1, 8))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
