"""omnimoe: load, train, extend, compare and run modality-aware sparse multimodal models.

Names are loaded on first use, so that ``import omnimoe`` costs nothing and registering a part needs no model. It makes
omnimoe known to transformers' Auto classes.
"""

from __future__ import annotations

from omnimoe.auto import register
from omnimoe.lazy import lazy

__version__ = "0.1.0"

_HOMES = {
    "omnimoe.config": ("Config", "ConfigError"),
    "omnimoe.registry": ("Registry", "RegistryError"),
    "omnimoe.ops": ("BackendError", "backend"),
    "omnimoe.layers": (
        "Attention",
        "BaseAttention",
        "LatentAttention",
        "Norm",
        "ReaderAttention",
        "Rope",
        "RowLayout",
        "SinkAttention",
        "StateSpace",
        "register_attention",
        "register_mask_rule",
    ),
    "omnimoe.routers": ("Router", "Routing", "register_router"),
    "omnimoe.experts": (
        "Experts",
        "FeedForward",
        "NoExperts",
        "RoutedAttention",
        "RoutedExperts",
        "RoutedProjections",
        "RoutedStateSpace",
        "register_expert",
        "register_experts",
    ),
    "omnimoe.encoders": ("load_encoder", "register_encoder"),
    "omnimoe.connectors": ("register_connector",),
    "omnimoe.modalities": ("Connected", "Modality", "Patches", "TokenRange", "Tokens", "register_modality"),
    "omnimoe.tokenizers": ("load_tokenizer", "register_tokenizer"),
    "omnimoe.backbone": ("LayerRange",),
    "omnimoe.inputs": ("InputError",),
    "omnimoe.model": ("OmniMoeConfig", "OmniMoeForCausalLM", "OmniMoeModel", "OmniMoeOutput", "register_model"),
    "omnimoe.classifier": ("OmniMoeForSequenceClassification",),
    "omnimoe.checkpoint": ("CheckpointError",),
    "omnimoe.hub": (
        "ModelInfo",
        "add_model_config",
        "from_pretrained",
        "list_models",
        "load",
        "model_info",
    ),
    "omnimoe.conversion": ("convert_checkpoint",),
    "omnimoe.flops": ("active_params", "flops", "total_params"),
    "omnimoe.model_card": ("model_card",),
    "omnimoe.shrink": ("shrink",),
    "omnimoe.export": ("ExportError", "export"),
    "omnimoe.routing_trace": ("record_routing",),
    "omnimoe.freeze": ("freeze", "keep_frozen", "unfreeze"),
    "omnimoe.auxiliary": (
        "add_auxiliary_routers",
        "hold_all_but_auxiliary",
        "measure_auxiliary_routers",
        "set_auxiliary_thresholds",
    ),
    "omnimoe.upcycle": ("UpcycleReport", "upcycle"),
    "omnimoe.lora": ("add_lora", "confine_lora", "lora_targets"),
    "omnimoe.quantize": ("QuantizationError", "quantize"),
    "omnimoe.spans": ("SpanProcessor", "read_spans"),
    "omnimoe.generate": ("Generated", "generate", "interleave"),
    "omnimoe.denoise": ("denoise",),
    "omnimoe.joint_denoise": ("denoise_jointly",),
    "omnimoe.evaluate": ("Measure", "register_metric"),
}
__getattr__, __dir__, _names = lazy(__name__, _HOMES)
__all__ = ["__version__", *_names]

register()
del register
