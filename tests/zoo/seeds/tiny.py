"""Tiny configs of the seeds as they would be published, and random models of transformers under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}


def scaled(kind: str, **values: Any) -> dict[str, Any]:
    """Rotary parameters with a scaling that reaches into short sequences."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **values}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "head_dim": 16,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _DEEPSEEK | scaled("yarn", original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7),
    ),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "num_hidden_layers": 3,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 2,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 24,
            "head_dim": 8,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 4,
        },
    ),
}
"""A case a family."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama untied with biases": ("llama", {"attention_bias": True, "tie_word_embeddings": False, "head_dim": 8}),
    "llama linear": ("llama", scaled("linear")),
    "llama llama3": (
        "llama",
        scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "qwen2 yarn": ("qwen2", scaled("yarn", original_max_position_embeddings=8)),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True}),
    "qwen2_moe normalised": (
        "qwen2_moe",
        CASES["qwen2_moe"][1] | {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": []},
    ),
    "deepseek_v3 one query matrix": ("deepseek_v3", _DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v3 halves": ("deepseek_v3", _DEEPSEEK | {"rope_interleave": False, "norm_topk_prob": False}),
    "gpt_oss windows first": (
        "gpt_oss",
        CASES["gpt_oss"][1] | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "deepseek_v3 with biases": ("deepseek_v3", _DEEPSEEK | {"attention_bias": True, "first_k_dense_replace": 0}),
}
"""Choices of a config that a family's released models do not all make alike."""


def published_model(case: str) -> PreTrainedModel:
    """transformers' own model of a case, every weight drawn, biases and norms too."""
    kind, values = (CASES | VARIANTS)[case]
    config = AutoConfig.for_model(kind, **{**_SHARED, **values})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        drawn = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in drawn:
            if "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def publish(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """The model in the layout it is published in."""
    model.save_pretrained(folder, **options)
    return folder
