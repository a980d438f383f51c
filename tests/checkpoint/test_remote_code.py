"""A checkpoint brings no code: whatever names it carries, nothing of it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from omnimoe import from_pretrained
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from tests.checkpoint.files import edit_json, load, same_weights
from tests.children import capped
from tests.refusals import refused, unchanged

MEMORY = 256 << 20
"""Bytes that a child may take which reads a checkpoint with code in it."""

REFERENCES = {
    "AutoConfig": "canary_module.Canary",
    "AutoModel": "canary_module.Canary",
    "AutoModelForCausalLM": "canary_module.Canary",
}


@pytest.fixture
def trapped(saved, tmp_path) -> Any:
    """A checkpoint whose every file of code leaves a mark when it is imported."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass Canary: pass\ndef generate(*args, **kwargs): open({str(mark)!r}, 'w')\n"
    (saved / "custom_generate").mkdir()
    for name in (
        "canary_module.py",
        "modeling_omnimoe.py",
        "__init__.py",
        "custom_generate/generate.py",
        "conftest.py",
    ):
        (saved / name).write_text(code)
    edit_json(saved / "config.json", auto_map=REFERENCES)
    yield saved
    assert not mark.exists(), "code of a checkpoint ran"


@pytest.mark.hazard(29)
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
@pytest.mark.parametrize(
    "by", [load, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained], ids=["class", "causal", "base"]
)
@capped(MEMORY)
def test_its_code_is_not_imported(trapped, model, by, trust):
    """Not even where the caller trusts it: the model is ours, so there is nothing to fetch."""
    with unchanged(trapped.parent, model):
        loaded = by(trapped, **trust)
    assert type(loaded).__module__ == "omnimoe.model"
    assert same_weights(loaded, model) or same_weights(loaded, model.model)


@pytest.mark.hazard(29)
@capped(MEMORY)
def test_nor_by_the_function(trapped, model):
    with unchanged(trapped.parent):
        loaded = from_pretrained(trapped)
    assert same_weights(loaded, model)


@pytest.mark.hazard(29)
@pytest.mark.parametrize("trust", [False, True])
@capped(MEMORY)
def test_nor_for_the_config(trapped, trust):
    with unchanged(trapped.parent):
        config = AutoConfig.from_pretrained(trapped, trust_remote_code=trust)
    assert type(config) is OmniMoeConfig


@pytest.mark.hazard(29)
@capped(MEMORY)
def test_nor_from_another_repository(trapped, model):
    edit_json(trapped / "config.json", auto_map={name: f"evil/repo--{value}" for name, value in REFERENCES.items()})
    with unchanged(trapped.parent):
        loaded = load(trapped, trust_remote_code=True)
    assert same_weights(loaded, model)


@pytest.mark.hazard(29)
@pytest.mark.parametrize("by", [load, from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
@capped(MEMORY)
def test_a_kernel_of_somebody_is_not_fetched(saved, field, by):
    """transformers takes the name of a repository for an implementation, and imports what it finds there."""
    edit_json(saved / "config.json", **{field: "evil/kernels"})
    with refused(saved, f"asks for code from elsewhere by {field} 'evil/kernels'"):
        by(saved)


@pytest.mark.hazard(29)
@capped(MEMORY)
def test_a_model_of_another_type_with_code_is_refused(trapped):
    edit_json(trapped / "config.json", model_type="canary")
    with refused(trapped.parent, "holds a model of type 'canary', not 'omnimoe'"):
        load(trapped, trust_remote_code=True)
    with refused(trapped.parent, "holds a model of type 'canary', not 'omnimoe'"):
        from_pretrained(trapped)


@pytest.mark.hazard(29)
@capped(MEMORY)
def test_a_saved_model_carries_no_code(model, tmp_path):
    with unchanged(model):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert isinstance(load(Path(tmp_path)), OmniMoeForCausalLM)
