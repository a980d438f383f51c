"""Cosmos3: a Mixture-of-Transformers of a reasoner and a generator, of which the generator reads the reasoner alone.

Words and pictures that are seen meet the first tower and each other in order of time. Latents of pictures, sounds and
actions meet the second; all that is generated together is one block that sees itself and the words before it, and that
no word sees. So what the reasoner computes is computed once, whatever steps the generator takes.

Source: https://arxiv.org/abs/2606.02800.
"""

from __future__ import annotations

from typing import Any

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.cosmos3.convert import COSMOS3, ROOT, TRANSFORMER

CARD = Card(
    family="cosmos3",
    title="Cosmos3: a reasoner and a generator of pictures, sounds and actions that reads it",
    paper="https://arxiv.org/abs/2606.02800",
    license="OpenMDW-1.1",
    weights={
        "cosmos3_nano": "hf-hub:nvidia/Cosmos3-Nano",
        "cosmos3_super": "hf-hub:nvidia/Cosmos3-Super",
        "cosmos3_super_t2i": "hf-hub:nvidia/Cosmos3-Super-Text2Image",
        "cosmos3_edge": "hf-hub:nvidia/Cosmos3-Edge",
    },
)

_TRANSFORMER: dict[str, Any] = {
    "_class_name": "Cosmos3OmniTransformer",
    "action_dim": 64,
    "action_gen": True,
    "attention_bias": False,
    "base_fps": 24,
    "enable_fps_modulation": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "latent_channel": 48,
    "latent_patch_size": 2,
    "max_position_embeddings": 262_144,
    "num_attention_heads": 32,
    "num_embodiment_domains": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "patch_latent_dim": 192,
    "qk_norm_for_text": True,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5_000_000,
    "sound_dim": 64,
    "sound_gen": True,
    "sound_latent_fps": 25,
    "timestep_scale": 0.001,
    "unified_3d_mrope_reset_spatial_ids": True,
    "unified_3d_mrope_temporal_modality_margin": 15_000,
    "vocab_size": 151_936,
}
_ROOT: dict[str, Any] = {
    "model_type": "cosmos3_omni",
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
    "text_config": {"model_type": "qwen3_vl_text", "bos_token_id": 151_643, "eos_token_id": 151_645},
    "vision_config": {
        "model_type": "qwen3_vl_vision",
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_SUPER = {"hidden_size": 5120, "intermediate_size": 25_600, "num_attention_heads": 64, "num_hidden_layers": 64}


def _declared(root: dict[str, Any], transformer: dict[str, Any]) -> OmniMoeConfig:
    return COSMOS3.config_of({ROOT: root, TRANSFORMER: transformer})


def _super(**changes: Any) -> OmniMoeConfig:
    root = {**_ROOT, "vision_config": {**_ROOT["vision_config"], "out_hidden_size": 5120}}
    return _declared(root, {**_TRANSFORMER, **_SUPER, **changes})


@register_model("cosmos3_nano")
def cosmos3_nano() -> OmniMoeConfig:
    """Cosmos3 Nano, 8B and 8B: pictures, clips, sounds and actions from words, over Qwen3-VL 8B."""
    return _declared(_ROOT, _TRANSFORMER)


@register_model("cosmos3_super")
def cosmos3_super() -> OmniMoeConfig:
    """Cosmos3 Super, 32B and 32B, over Qwen3-VL 32B."""
    return _super()


@register_model("cosmos3_super_t2i")
def cosmos3_super_t2i() -> OmniMoeConfig:
    """Cosmos3 Super for pictures from words: as Super, without actions."""
    return _super(action_gen=False)


@register_model("cosmos3_edge")
def cosmos3_edge() -> OmniMoeConfig:
    """Cosmos3 Edge, 2B and 2B: without sound, over a Nemotron with squared ReLU."""
    root = {
        "model_type": "cosmos3_edge",
        "image_token_id": 19,
        "video_token_id": 18,
        "vision_start_token_id": 20,
        "vision_end_token_id": 21,
        "projector_config": {"merger_intermediate_size": 11_520},
        "text_config": {"bos_token_id": 1, "eos_token_id": 11, "max_position_embeddings": 131_072},
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_patches": 256,
            "patch_size": 16,
            "spatial_merge_size": 2,
        },
    }
    changes = {
        "hidden_act": "relu2",
        "hidden_size": 2048,
        "intermediate_size": 9216,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "qk_norm_for_text": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"mrope_section": [24, 20, 20]},
        "rope_theta": 100_000_000,
        "sound_dim": None,
        "sound_gen": False,
        "use_und_k_norm_for_gen": True,
        "vocab_size": 131_072,
    }
    return _declared(root, {**_TRANSFORMER, **changes})
