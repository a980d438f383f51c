"""``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know omnimoe once ``import omnimoe`` has run, at no cost.

transformers' own models stand in its tables by name, and a name's module is imported when it is looked up. Ours are
entered the same way: now where the tables are there, otherwise as soon as somebody imports them. Whether processes that
were started anew know the classes then depends on ``import omnimoe`` alone, which unpickling anything of ours does.
Should transformers come to keep its tables otherwise, ``import omnimoe.model`` still registers the classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "omnimoe"
TABLES: dict[str, dict[str, str]] = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING": "OmniMoeConfig"},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING": "OmniMoeModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING": "OmniMoeForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "OmniMoeForSequenceClassification",
    },
}
"""Module to table to the class of ours that it holds."""


def register() -> None:
    """Enters the names; where the tables are not loaded yet, once they are."""
    for name in TABLES:
        if name in sys.modules:
            _enter(sys.modules[name])
    if not all(name in sys.modules for name in TABLES) and not any(isinstance(held, _Watch) for held in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _enter(module: ModuleType) -> None:
    for table, class_name in TABLES[module.__name__].items():
        mapping: Any = getattr(module, table, None)
        names = getattr(mapping, "_mapping", getattr(mapping, "_model_mapping", None))
        modules = getattr(mapping, "_modules", None)
        if names is None or modules is None:
            continue
        names[MODEL_TYPE] = class_name
        modules[MODEL_TYPE] = sys.modules["omnimoe"]  # whose names load on first use
        if hasattr(mapping, "_reverse_config_mapping"):
            mapping._reverse_config_mapping["OmniMoeConfig"] = MODEL_TYPE


class _Watch(MetaPathFinder):
    """Finds nothing itself; enters our names where a module with tables has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TABLES:
            return None
        others = (held for held in sys.meta_path if held is not self)
        spec = next(filter(None, (held.find_spec(fullname, path, target) for held in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _enter(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
