"""The published classes at a tiny size with random weights, to compare the adapters with the classes themselves."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIXTURES = Path(__file__).parents[1] / "fixtures"
PICTURES = sorted((FIXTURES / "pictures").glob("*.png"))
CLIP = FIXTURES / "speech" / "statue_of_liberty.wav"

_VQ = {"base_channels": 32, "channel_multiplier": (1, 2), "num_res_blocks": 1, "latent_channels": 8, "embed_dim": 8}
_TEXT = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VQ_CONFIGS: dict[str, dict[str, Any]] = {
    "chameleon_vq": {**_VQ, "resolution": 32, "num_embeddings": 64},
    "emu3_vq": {
        **_VQ,
        "embed_dim": 4,
        "latent_channels": 4,
        "codebook_size": 64,
        "attn_resolutions": (1,),
        "hidden_size": 64,
    },
    "janus_vq": {**_VQ, "num_patches": 16, "num_embeddings": 64, "projection_dim": 32, "image_token_embed_dim": 32},
}
VQ_CLASSES = {"chameleon_vq": "ChameleonVQVAE", "emu3_vq": "Emu3VQVAE", "janus_vq": "JanusVQVAE"}
CODEC_CLASSES = {"mimi": "MimiModel", "encodec": "EncodecModel", "dac": "DacModel"}
CODEC_CONFIGS: dict[str, dict[str, Any]] = {
    "mimi": {
        "hidden_size": 16,
        "num_filters": 4,
        "upsampling_ratios": [4, 2],
        "codebook_size": 32,
        "codebook_dim": 8,
        "num_quantizers": 4,
        "vector_quantization_hidden_dimension": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "upsample_groups": 16,
        "sliding_window": 8,
        "sampling_rate": 800,
    },
    "encodec": {
        "hidden_size": 16,
        "num_filters": 4,
        "upsampling_ratios": (4, 2),
        "codebook_size": 32,
        "num_lstm_layers": 1,
        "sampling_rate": 8000,
        "target_bandwidths": (10.0, 20.0),
    },
    "dac": {
        "encoder_hidden_size": 4,
        "downsampling_ratios": (4, 2),
        "decoder_hidden_size": 16,
        "n_codebooks": 3,
        "codebook_size": 32,
        "codebook_dim": 4,
        "sampling_rate": 8000,
    },
}


def tiny_vq(name: str, **changes: Any) -> Any:
    """A VQ model of transformers, 2 pixels a cell."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, VQ_CLASSES[name])
    return kind(kind.config_class(**{**VQ_CONFIGS[name], **changes})).eval()


def tiny_codec(name: str, **changes: Any) -> Any:
    """A neural codec of transformers with random codebooks."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, CODEC_CLASSES[name])
    model = kind(kind.config_class(**{**CODEC_CONFIGS[name], **changes})).eval()
    # Codebooks start at zero in two of the classes, where every frame would get code 0.
    for key, buffer in model.named_buffers():
        if key.endswith(("codebook.embed", "codebook.embed_sum")):
            buffer.copy_(torch.randn(buffer.shape))
    return model


def tiny_chat(name: str) -> Any:
    """The whole published model that has the VQ model as a part, for its layout of files."""
    import transformers

    torch.manual_seed(0)
    vq = VQ_CONFIGS[name]
    if name == "chameleon_vq":
        words = {"<image>": 5, **{f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCDEFGHIJ")}}
        config = transformers.ChameleonConfig(**_TEXT, vq_config=vq, vocabulary_map=words)
        return transformers.ChameleonForConditionalGeneration(config)
    if name == "emu3_vq":
        words = {"<image>": 5, "<|extra_200|>": 6, **{f"<|visual token {i:06d}|>": 100 + i for i in range(64)}}
        config = transformers.Emu3Config(text_config=_TEXT, vq_config=vq, vocabulary_map=words)
        return transformers.Emu3ForConditionalGeneration(config)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = transformers.JanusConfig(
        vision_config={**vision, "projection_dim": 32, "intermediate_size": 32},
        text_config={**_TEXT, "model_type": "llama"},
        vq_config=vq,
    )
    return transformers.JanusForConditionalGeneration(config)


def read_clip() -> np.ndarray:
    """A spoken label, ``(n,)`` int16 at 16 kHz."""
    with wave.open(str(CLIP), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").copy()
