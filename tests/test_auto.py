"""``import omnimoe`` alone makes transformers' Auto classes know its models, in whatever order the two are imported."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from omnimoe import auto
from tests.declarations import DENSE, build

BEFORE = """
import sys
import omnimoe
assert "torch" not in sys.modules and "transformers" not in sys.modules, "import omnimoe costs something"
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "omnimoe.model" not in sys.modules, "transformers imported the model before anybody asked for it"
"""
AFTER = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
assert "omnimoe" not in MODEL_MAPPING_NAMES
import omnimoe
assert "omnimoe.model" not in sys.modules
assert MODEL_MAPPING_NAMES["omnimoe"] == "OmniMoeModel"
"""
LOADS = """
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
assert type(config).__name__ == "OmniMoeConfig" and config.num_layers == 2, config
assert type(AutoModel.from_pretrained(folder)).__name__ == "OmniMoeModel"
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model).__name__ == "OmniMoeForCausalLM"
assert type(AutoModelForCausalLM.from_config(config)) is type(model) is omnimoe.OmniMoeForCausalLM
from transformers import AutoModelForSequenceClassification
assert type(AutoModelForSequenceClassification.from_config(config)) is omnimoe.OmniMoeForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert "OmniMoeForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
print("loaded")
"""


def test_a_folder_is_loaded_by_the_auto_classes_in_a_new_process(tmp_path):
    build(DENSE).save_pretrained(tmp_path)
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code + LOADS, str(tmp_path)], stdout=-1, stderr=-1, text=True
        )
        for code in (BEFORE, AFTER)
    ]
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.endswith("loaded\n")


def test_the_tables_hold_our_names_once():
    from transformers.models.auto import configuration_auto, modeling_auto

    auto.register()
    assert sum(isinstance(held, auto._Watch) for held in sys.meta_path) <= 1
    assert configuration_auto.CONFIG_MAPPING_NAMES["omnimoe"] == "OmniMoeConfig"
    assert list(modeling_auto.MODEL_MAPPING_NAMES).count("omnimoe") == 1
    assert modeling_auto.MODEL_MAPPING[type(DENSE)].__name__ == "OmniMoeModel"


@pytest.mark.parametrize("mapping", [None, SimpleNamespace(), SimpleNamespace(_mapping={})])
def test_tables_of_another_form_are_left_alone(mapping):
    module = SimpleNamespace(__name__="transformers.models.auto.configuration_auto", CONFIG_MAPPING=mapping)
    auto._enter(module)
    assert mapping is None or not getattr(mapping, "_mapping", None)


def test_other_imports_are_not_watched():
    assert auto._Watch().find_spec("json", None) is None
    assert auto._Watch().find_spec("transformers.models.auto.no_such_module", None) is None
