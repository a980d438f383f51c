"""Adapters are compared with the model before it is changed, and fetched and checked where they lie on the Hub."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from omnimoe import CheckpointError, OmniMoeForCausalLM, add_lora, from_pretrained
from omnimoe.checkpoint.errors import MisfitError
from tests.declarations import DECLARATIONS, build, ids_like
from tests.refusals import refused

peft = pytest.importorskip("peft")
CONFIG = DECLARATIONS["moma"]
FILE = "adapter_model.safetensors"
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(base, tmp_path):
    add_lora(from_pretrained(base), r=2, init_lora_weights=False).save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def edit(folder, change):
    held = load_file(folder / FILE)
    change(held)
    save_file({name: value.contiguous() for name, value in held.items()}, folder / FILE, metadata={"format": "pt"})


def half(held):
    for name in [name for name in held if "lora_A" in name]:
        del held[name]


def of_another(held):
    for name in list(held):
        held[name.replace("backbone", "trunk")] = held.pop(name)


CHANGES = {
    "half of them": (half, "12 missing:"),
    "of another model": (of_another, "24 unexpected:"),
    "one more": (lambda held: held.update({"base_model.model.extra.lora_A.weight": torch.ones(2)}), "1 unexpected:"),
    "of another rank": (
        lambda held: held.update({name: value[:1] for name, value in held.items() if "q_proj.lora_A" in name}),
        "2 misshapen:",
    ),
    "a head of another size": (lambda held: held.update({HEAD: torch.ones(3, 16)}), "lm_head.weight: (3, 16) in the"),
}


@pytest.mark.hazard(8)
@pytest.mark.parametrize("way", CHANGES)
def test_adapters_that_do_not_fit(base, adapters, way):
    change, fragment = CHANGES[way]
    edit(adapters, change)
    model, ids = from_pretrained(base), ids_like(CONFIG)
    with refused((model, base, adapters), fragment, MisfitError) as told:
        model.load_adapter(str(adapters))
    assert f"the adapters in {adapters} do not fit the model '{base}'" in str(told)
    assert torch.equal(model(ids).logits, build(CONFIG)(ids).logits)
    for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
        with refused((base, adapters), "the adapters in", MisfitError):
            load(adapters)


def test_what_fits_is_loaded_where_that_is_asked(base, adapters):
    edit(adapters, half)
    report = from_pretrained(base).load_adapter(str(adapters), ignore_mismatched_sizes=True)
    assert len(report.missing_keys) == 12
    assert isinstance(from_pretrained(adapters, strict=False), OmniMoeForCausalLM)


def test_weights_that_were_trained_along(base, adapters):
    head = torch.randn(40, 16)
    edit(adapters, lambda held: held.update({HEAD: head}))
    model = from_pretrained(base)
    model.load_adapter(str(adapters))
    assert torch.equal(model.lm_head.weight, head)


def test_adapters_of_the_head(base, tmp_path):
    """PEFT saves an adapted head along, under the name that it has below the adapter."""
    model = add_lora(from_pretrained(base), sites=["lm_head", "q_proj"], r=2, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / FILE)
    ids = ids_like(CONFIG)
    assert torch.equal(from_pretrained(tmp_path)(ids).logits, model.eval()(ids).logits)


def test_adapters_onto_quantised_banks(base, adapters):
    pytest.importorskip("torchao")
    model = from_pretrained(base, quantization_config="int8")
    with pytest.raises(CheckpointError, match="the model's are quantised; load it without quantisation, merge them"):
        model.load_adapter(str(adapters))
    assert not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(CheckpointError, match="the model's are quantised"):
        from_pretrained(adapters, quantization_config="int8")


def test_adapters_of_a_part_of_a_model(base, tmp_path):
    part = from_pretrained(base, towers=["image"])
    ids = torch.tensor([[20, 25, 31]])
    adapted = add_lora(part, r=2, init_lora_weights=False)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(MisfitError, match="load that, then call its load_adapter"):
        from_pretrained(tmp_path)
    again = from_pretrained(base, towers=["image"])
    again.load_adapter(str(tmp_path))
    assert torch.equal(again.eval()(ids).logits, adapted.eval()(ids).logits)


def test_a_part_or_fresh_weights_of_adapters(adapters, base):
    from omnimoe import load

    with pytest.raises(CheckpointError, match="holds adapters, which are loaded with the whole model"):
        from_pretrained(adapters, towers=["image"])
    with pytest.raises(CheckpointError, match=rf"holds adapters of '{base}'; name that model, or pass pretrained=True"):
        load(str(adapters))


def test_without_peft(base, adapters, monkeypatch):
    model = from_pretrained(base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'omnimoe\[peft\]'"):
        model.load_adapter(str(adapters))


def test_a_folder_without_adapters(base):
    with pytest.raises(CheckpointError, match=r"holds no adapters: it has no adapter_config\.json"):
        from_pretrained(base).load_adapter(str(base))


def test_a_second_adapter_and_one_given_in_memory(base, adapters):
    model = from_pretrained(base)
    model.load_adapter(str(adapters), "first")
    model.load_adapter(str(adapters), adapter_name="second")
    assert set(model.peft_config) == {"first", "second"}
    other = from_pretrained(base)
    config = peft.PeftConfig.from_pretrained(adapters)
    other.load_adapter(peft_config=config, adapter_state_dict=load_file(adapters / FILE))
    model.set_adapter("second")
    ids = ids_like(CONFIG)
    assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)


def test_pefts_own_classes_read_them(base, adapters):
    """Saved by ``add_lora``, an adapter says what task it is for, by which PEFT finds the class of its base."""
    assert json.loads((adapters / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    ids = ids_like(CONFIG)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(adapters)
    assert torch.equal(found(ids).logits, from_pretrained(adapters)(ids).logits)
