"""Configs that are broken, absent or absurd: refused before a weight is read and before memory is taken."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from omnimoe import CheckpointError, convert_checkpoint, from_pretrained
from omnimoe.checkpoint import memory
from omnimoe.checkpoint.memory import available_memory, check_memory
from omnimoe.config import ConfigError
from omnimoe.model import OmniMoeForCausalLM
from tests.checkpoint.files import WEIGHTS, edit_json, load, same_weights, small
from tests.children import ChildError, capped, in_child
from tests.declarations import build
from tests.refusals import refused
from tests.zoo.seeds.tiny import publish, published_model

MEMORY = 256 << 20
"""Bytes that a child may take to refuse a config."""
EVERY_WAY = [load, from_pretrained, AutoModelForCausalLM.from_pretrained]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A published checkpoint of another family."""
    return publish(published_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.hazard(12)
@pytest.mark.parametrize("by", [load, from_pretrained])
@capped(MEMORY)
def test_an_absent_config_is_no_default(saved, by):
    """transformers would build the default model of the class and fill it with what it finds."""
    (saved / "config.json").unlink()
    with refused(saved, "has no config.json, so it is no saved model"):
        by(saved)


@pytest.mark.hazard(12)
@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ('{"model_type": "omnimoe",}', "cannot be read as JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "holds a model of type None, not 'omnimoe'"),
        ('{"model_type": "llama"}', "holds a model of type 'llama', not 'omnimoe'; convert it first"),
        ('{"model_type": "omnimoe", "model_type": "llama"}', "the key 'model_type' stands there twice"),
        ('{"model_type": "omnimoe", "transformers_weights": "../evil.bin"}', "names its weights '../evil.bin'"),
        ('{"a":' * 50_000, "cannot be read as JSON"),
        ('{"model_type": "omnimoe", "dtype": "int8"}', "gives dtype 'int8'; write 'float32'"),
        ('{"model_type": "omnimoe", "dtype": "__import__"}', "gives dtype '__import__'"),
        ('{"model_type": "omnimoe", "torch_dtype": 16}', "gives torch_dtype 16"),
        ('{"model_type": "omnimoe", "quantization_config": {"quant_method": "x"}}', "was quantised by 'x'"),
        ('{"model_type": "omnimoe", "quantization_config": "int8"}', "was quantised by 'int8'"),
        ('{"model_type": "omnimoe", "quantization_config": {"quant_method": []}}', "was quantised by []"),
    ],
    ids=range(15),
)
@capped(MEMORY)
def test_a_broken_config(saved, text, fragment):
    (saved / "config.json").write_text(text)
    with refused(saved, fragment):
        load(saved)


@pytest.mark.hazard(12)
@capped(MEMORY)
def test_a_broken_config_of_generation(saved):
    """transformers goes on without it, and generates otherwise than was meant."""
    (saved / "generation_config.json").write_text("{")
    with refused(saved, "generation_config.json cannot be read as JSON"):
        load(saved)


@pytest.mark.hazard(12)
@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": "x"},
        {"watermarking_config": 3},
        {"cache_implementation": "wat"},
        {"early_stopping": 7},
        {"num_beams": "x"},
        {"temperature": "hot"},
        {"do_sample": 3},
        {"compile_config": 3},
    ],
    ids=str,
)
@capped(MEMORY)
def test_a_config_of_generation_with_values_that_mean_nothing(saved, values):
    edit_json(saved / "generation_config.json", **values)
    for by in EVERY_WAY:
        with refused(saved, "generation_config.json "):
            by(saved)


@pytest.mark.hazard(12)
@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"id2label": 3}, "gives id2label 3, not names by number"),
        ({"id2label": {"x": "y"}}, "gives id2label {'x': 'y'}"),
        ({"num_labels": "x"}, "gives num_labels 'x', which must be a count"),
        ({"num_labels": 10**9}, "gives num_labels 1000000000, which must be a count of at most 1,048,576"),
        ({"attn_implementation": "nope"}, "describes a model that cannot be built"),
        ({"experts_implementation": "nope"}, "describes a model that cannot be built"),
    ],
    ids=str,
)
@capped(MEMORY)
def test_fields_of_transformers_that_mean_nothing(saved, values, fragment):
    edit_json(saved / "config.json", **values)
    for by in EVERY_WAY[:2]:
        with refused(saved, fragment):
            by(saved)


def with_experts(**changes: Any) -> dict[str, Any]:
    return {"experts": small().to_dict()["experts"] | changes}


def with_attention(**changes: Any) -> dict[str, Any]:
    return {"attention": small().to_dict()["attention"] | changes}


@pytest.mark.hazard(12)
@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (with_experts(router={"type": "top_k", "top_k": 5}), "top_k"),
        (with_experts(num_experts=0), "num_experts must be at least 1, got 0"),
        (with_experts(type="no_such_part"), "unknown experts 'no_such_part'"),
        (with_attention(num_heads=5), "num_heads"),
        (with_attention(num_kv_heads=3), "num_kv_heads"),
        ({"hidden_size": "16"}, "hidden_size must be int, got '16'"),
        ({"hidden_size": -16}, "must be positive"),
        ({"modalities": []}, "at least one modality"),
        ({"vocab_size": 3}, "vocab_size 3 is less than the 40 rows"),
        ({"eos_token_id": "two"}, "eos_token_id must be"),
        ({"mask": "causall"}, "did you mean 'causal'"),
        ({"hiden_size": 16}, "has no field 'hiden_size'; did you mean 'hidden_size'?"),
        ({"initializer_range": float("inf")}, "initializer_range inf a number from 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@capped(MEMORY)
def test_fields_that_do_not_fit_each_other(saved, changes, fragment):
    edit_json(saved / "config.json", **changes)
    with refused(saved, fragment, ValueError):
        load(saved)
    with refused(saved, fragment):
        from_pretrained(saved)


def with_rope(**changes: Any) -> dict[str, Any]:
    attention = small().to_dict()["attention"]
    return {"attention": attention | {"rope": attention["rope"] | changes}}


@pytest.mark.hazard(12)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -1])
@pytest.mark.parametrize("field", ["norm", "qk_norm_eps", "theta"])
@capped(MEMORY)
def test_numbers_by_which_every_answer_would_be_none(saved, field, value):
    """Such a model runs, and its logits are NaN or of no use."""
    norm = {"norm": small().to_dict()["norm"] | {"eps": value}}
    changes = {"norm": norm, "qk_norm_eps": with_attention(qk_norm_eps=value), "theta": with_rope(theta=value)}[field]
    edit_json(saved / "config.json", **changes)
    name = {"norm": "Norm.Config.eps", "qk_norm_eps": "Attention.Config.qk_norm_eps", "theta": "Rope.Config.theta"}
    for by, error in ((load, ConfigError), (from_pretrained, CheckpointError)):
        with refused(saved, f"{name[field]} ", error) as told:
            by(saved)
        # without the folder, in whose name a number may stand too
        assert str(value) in str(told).replace(str(saved), "")


@pytest.mark.hazard(12)
@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (with_rope(theta=0), "Rope.Config.theta must be a positive number, got 0"),
        (with_rope(scaling={"type": "linear", "factor": float("inf")}), "factor must be a positive number, got inf"),
        (with_rope(scaling={"type": "linear", "factor": float("nan")}), "LinearScaling"),
        ({"embedding_scale": float("nan")}, "embedding_scale is nan"),
        (with_experts(router={"type": "top_k", "top_k": 2, "noise": float("nan")}), "TopKRouter.Config.noise is nan"),
    ],
    ids=range(5),
)
@capped(MEMORY)
def test_other_numbers_that_are_none(saved, changes, fragment):
    edit_json(saved / "config.json", **changes)
    with refused(saved, fragment):
        from_pretrained(saved)


@pytest.mark.hazard(12)
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@capped(MEMORY)
def test_numbers_of_a_published_config_that_are_none(llama, tmp_path, field, value):
    folder = shutil.copytree(llama, tmp_path / "llama")
    plain = json.loads((folder / "config.json").read_text())
    parameters = plain["rope_parameters"] | ({field: value} if field == "rope_theta" else {})
    edit_json(folder / "config.json", **{field: value, "rope_parameters": parameters})
    for act in (lambda: from_pretrained(folder), lambda: convert_checkpoint(folder, tmp_path / "ours")):
        with refused((folder, tmp_path / "ours"), "the config of this llama checkpoint does not fit"):
            act()


ABSURD = [
    {"num_layers": 10**9},
    {"num_layers": 2**80},
    {"hidden_size": 2**40},
    {"vocab_size": 2**50},
    {"max_position_embeddings": 2**60},
    with_experts(num_experts=10**9),
    with_experts(num_shared_experts=10**9),
    with_experts(intermediate_size=2**50),
    with_attention(num_heads=10**12),
    {"modalities": [small().to_dict()["modalities"][0] | {"vocab_size": 2**45}]},
]


@pytest.mark.hazard(12)
@pytest.mark.parametrize("number", range(len(ABSURD)))
@capped(1 << 30)
def test_a_size_that_no_model_has(saved, number):
    """In a child that may take 1 GB: it is refused, not killed."""
    edit_json(saved / "config.json", **ABSURD[number])
    for by, error in ((load, ConfigError), (from_pretrained, CheckpointError)):
        with refused(saved, "beyond any model", error):
            by(saved)


@pytest.mark.hazard(12)
@pytest.mark.parametrize("by", EVERY_WAY)
@capped(2 << 30)
def test_a_size_that_does_not_fit_is_named_in_bytes_before_it_is_taken(saved, by):
    """Possible sizes, for which there is no memory here: 4096 x 2**20 weights in each of two tables, and more."""
    edit_json(saved / "config.json", hidden_size=2**20, vocab_size=2**16, **with_attention(head_dim=16))
    with refused(saved, "config.json asks for 5") as told:
        by(saved)
    assert "of memory are free" in str(told)
    assert "check_size=False" in str(told)


@capped(2 << 30)
def test_without_the_check_the_shapes_still_refuse_it(saved):
    edit_json(saved / "config.json", hidden_size=2**20, vocab_size=2**16, **with_attention(head_dim=16))
    with refused(saved, "misshapen"):
        load(saved, check_size=False)


class TestMemory:
    def test_what_is_free_is_the_least_that_is_known(self, monkeypatch):
        monkeypatch.setattr(memory, "_of_machine", lambda: 300)
        monkeypatch.setattr(memory, "_of_container", lambda: 200)
        monkeypatch.setattr(memory, "_of_process", lambda: None)
        assert available_memory() == 200
        check_memory(200, "it")
        with pytest.raises(
            ValueError, match=r"it asks for 201 B of weights \(201 bytes\), and 200 B of memory are free"
        ):
            check_memory(201, "it")

    def test_where_nobody_knows_nothing_is_refused(self, monkeypatch):
        for name in ("_of_machine", "_of_container", "_of_process"):
            monkeypatch.setattr(memory, name, lambda: None)
        assert available_memory() is None
        check_memory(1 << 70, "it")

    def test_a_limit_of_the_process_counts(self):
        free = in_child(lambda: [available_memory()], memory=1 << 28)[0]
        assert 0 < free <= 1 << 28

    def test_a_control_group(self, monkeypatch):
        held = {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 1\ninactive_file 50\n"}
        monkeypatch.setattr(memory, "_read", lambda path: held.get(path.rpartition("/")[2], ""))
        assert memory._of_container() == 150
        held["memory.max"] = "max\n"
        assert memory._of_container() is None

    def test_a_child_that_takes_more_fails_alone(self):
        with pytest.raises(ChildError, match="allocate"):
            in_child(lambda: torch.ones(1 << 31).sum().item(), memory=1 << 30)


def test_a_config_of_its_own_stands_for_the_folders(saved, model):
    """As ``AutoModelForCausalLM`` passes it; weights alone are enough then."""
    (saved / "config.json").unlink()
    assert same_weights(load(saved, config=small()), model)


def test_fields_can_be_changed_while_loading(saved):
    assert load(saved, max_position_embeddings=99).config.max_position_embeddings == 99


def test_unknown_fields_of_another_version_stay(saved, model):
    edit_json(saved / "config.json", note_of_another_tool={"a": 1})
    loaded = load(saved)
    assert loaded.config.note_of_another_tool == {"a": 1}
    assert same_weights(loaded, model)
    assert json.loads((saved / "config.json").read_text())["model_type"] == "omnimoe"
    assert (saved / WEIGHTS).is_file()
    assert isinstance(loaded, OmniMoeForCausalLM)
    assert build is not None
