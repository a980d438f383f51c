"""Adapters of PEFT through the same checks: saved beside or into a model, loaded by the class, refused as pickles."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import CheckpointError, from_pretrained
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.publish import MANIFEST, read_manifest
from tests.checkpoint.files import WEIGHTS, edit, edit_json, load, same_weights
from tests.declarations import ids_like
from tests.refusals import refused

peft = pytest.importorskip("peft")
ADAPTERS = "adapter_model.safetensors"


@pytest.fixture
def adapted(saved):
    """A loaded model with an adapter that does something."""
    model = load(saved)
    model.add_adapter(peft.LoraConfig(target_parameters=["experts.down_proj"], target_modules=[], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    return model.eval()


def answers(model: OmniMoeForCausalLM) -> torch.Tensor:
    return model(ids_like(model.config)).logits


@pytest.mark.parametrize("by", [load, AutoModelForCausalLM.from_pretrained])
def test_a_folder_of_adapters_brings_its_base(adapted, model, tmp_path, by):
    adapted.save_pretrained(tmp_path / "adapters")
    assert set(read_manifest(tmp_path / "adapters")) >= {ADAPTERS, "adapter_config.json"}
    loaded = by(tmp_path / "adapters")
    assert torch.equal(answers(loaded), answers(adapted))
    assert not torch.equal(answers(loaded), answers(model))


def test_adapters_saved_into_the_folder_of_their_base_leave_it_there(adapted, saved, model):
    before = (saved / WEIGHTS).read_bytes()
    adapted.save_pretrained(saved)
    assert (saved / WEIGHTS).read_bytes() == before
    assert set(read_manifest(saved)) >= {ADAPTERS, WEIGHTS, "config.json"}
    assert torch.equal(answers(load(saved)), answers(adapted))
    (saved / ADAPTERS).unlink()
    (saved / "adapter_config.json").unlink()
    assert same_weights(load(saved), model)


@pytest.mark.parametrize("by", [load, AutoModelForCausalLM.from_pretrained])
def test_adapters_in_a_pickle_or_malformed_are_refused(adapted, tmp_path, by):
    folder = tmp_path / "adapters"
    adapted.save_pretrained(folder)
    content = (folder / ADAPTERS).read_bytes()
    (folder / ADAPTERS).write_bytes(content[:-1])
    with refused(folder, "is cut off"):
        by(folder)
    (folder / ADAPTERS).unlink()
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")
    with refused(folder, "has adapters and no adapter_model.safetensors"):
        by(folder)


def test_adapters_that_name_no_base(adapted, tmp_path):
    folder = tmp_path / "adapters"
    adapted.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    with refused(folder, "names no base model"):
        load(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.hazard(15)
def test_adapters_are_verified_with_their_base(adapted, saved, tmp_path):
    folder = tmp_path / "adapters"
    adapted.save_pretrained(folder)
    content = (folder / ADAPTERS).read_bytes()
    for place in (folder, saved):
        adapted.save_pretrained(place)
        assert torch.equal(answers(load(folder, verify=True)), answers(adapted))
        (place / ADAPTERS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with refused(place, f"{ADAPTERS} is not the file that was saved"):
            load(place, verify=True)
        (place / ADAPTERS).write_bytes(content)
    (folder / MANIFEST).unlink()
    with refused(folder, "has no manifest.json to verify it by"):
        load(folder, verify=True)


@pytest.mark.parametrize("by", [load, from_pretrained])
def test_adapters_of_a_base_that_does_not_fit_its_config(adapted, saved, tmp_path, by):
    """The misfit is told, not that a folder of adapters has no model in it."""
    adapted.save_pretrained(tmp_path / "adapters")
    edit(saved, lambda held: held.pop(next(iter(held))))
    with refused(tmp_path / "adapters", "1 missing:", MisfitError):
        by(tmp_path / "adapters")


@pytest.mark.parametrize("by", [load, from_pretrained])
def test_adapters_of_whole_numbers(adapted, tmp_path, by):
    folder = tmp_path / "adapters"
    adapted.save_pretrained(folder)
    edit(folder, lambda held: held.update({name: value.to(torch.int8) for name, value in held.items()}), ADAPTERS)
    with refused(folder, "as I8, and adapters are of floating point"):
        by(folder)
    with refused(folder, "as I8, and adapters are of floating point"):
        load(adapted.name_or_path).load_adapter(str(folder))


@pytest.mark.parametrize(
    "values",
    [{"peft_type": "NOPE"}, {"peft_type": 3}, {"r": "x"}, {"r": 0}, {"r": [2]}, {"task_type": "NOPE"}],
    ids=str,
)
def test_a_config_of_adapters_that_means_nothing(adapted, tmp_path, values):
    folder = tmp_path / "adapters"
    adapted.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", **values)
    for by in (load, from_pretrained):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json describes cannot be loaded"):
            by(folder)
