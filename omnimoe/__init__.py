"""omnimoe: load, train, extend, compare and run modality-aware sparse multimodal models.

Names are loaded on first use, so that ``import omnimoe`` costs nothing and registering a part needs no model.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "omnimoe.config": ("Config", "ConfigError"),
    "omnimoe.registry": ("Registry", "RegistryError"),
    "omnimoe.layers": (
        "Attention",
        "BaseAttention",
        "Norm",
        "Rope",
        "RowLayout",
        "register_attention",
        "register_mask_rule",
    ),
    "omnimoe.routers": ("Router", "Routing", "register_router"),
    "omnimoe.experts": ("Experts", "FeedForward", "RoutedExperts", "register_experts"),
    "omnimoe.modalities": ("Modality", "Patches", "TokenRange", "Tokens", "register_modality"),
    "omnimoe.tokenizers": ("load_tokenizer", "register_tokenizer"),
    "omnimoe.backbone": ("LayerRange",),
    "omnimoe.inputs": ("InputError",),
    "omnimoe.model": ("OmniMoeConfig", "OmniMoeForCausalLM", "OmniMoeModel", "OmniMoeOutput", "register_model"),
    "omnimoe.checkpoint": ("CheckpointError",),
    "omnimoe.hub": (
        "ModelInfo",
        "add_model_config",
        "from_pretrained",
        "list_models",
        "load",
        "model_info",
    ),
    "omnimoe.flops": ("active_params", "flops", "total_params"),
    "omnimoe.shrink": ("shrink",),
    "omnimoe.spans": ("SpanProcessor", "read_spans"),
    "omnimoe.generate": ("Generated", "generate", "interleave"),
    "omnimoe.denoise": ("denoise",),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_WHERE)]

if TYPE_CHECKING:
    from omnimoe.backbone import LayerRange as LayerRange


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'omnimoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing ``omnimoe.flops`` would set ``flops`` to the module, where the function of that name should be."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _WHERE.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
