"""Chameleon at a tiny size as it is published: transformers' own model, every weight drawn, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, GenerationConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from omnimoe.tokenizers.vq_autoencoder import VqAutoencoder
from omnimoe.zoo.chameleon.convert import BEGIN, BOS, END, EOS, PAD, TURN, word_of

NUM_CODES, FIRST_CODE, CELLS, SIDE = 32, 4, 16, 8
VQ: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "resolution": SIDE,
    "attn_resolutions": [4],
    "latent_channels": 8,
    "embed_dim": 8,
    "num_embeddings": NUM_CODES,
}
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
FORMS: dict[str, dict[str, Any]] = {
    "7b": {},
    "34b": {"swin_norm": True, "num_key_value_heads": 2, "model_parallel_size": 2},
}
"""What tells the two published sizes apart."""


def vocabulary(is_mixed: bool = False) -> dict[str, int]:
    """Words and their ids: specials, codes in order or ``is_mixed``, the bytes."""
    order = [(7 * code + 3) % NUM_CODES if is_mixed else code for code in range(NUM_CODES)]
    words = {BOS: 0, PAD: 1, EOS: 2, "<unk>": 3}
    words |= {word_of(code): FIRST_CODE + place for place, code in enumerate(order)}
    words |= {END: 36, BEGIN: 37, TURN: 38, "<image>": 39}
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return words | {letter: 40 + place for place, letter in enumerate(letters)}


VOCAB = 40 + 256


def published_config(form: str, *, is_mixed: bool = False, **changes: Any) -> ChameleonConfig:
    """The config of a form; ``bos_token_id`` is wrong in it, as it is in what is published."""
    shared = {
        "vocab_size": VOCAB,
        "vocabulary_map": vocabulary(is_mixed),
        "vq_config": VQ,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return ChameleonConfig(**{**shared, **SIZES, **FORMS[form], **changes})


def published_model(form: str, **options: Any) -> ChameleonForConditionalGeneration:
    """transformers' model, every weight drawn, biases and norms too."""
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration._from_config(
        published_config(form, **options), attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(len(form))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".vqmodel." in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm.weight" in name else 0.2 * noise)
        spread(model.model.vqmodel, generator)
    return model


def spread(vqmodel: ChameleonVQVAE, generator: torch.Generator) -> None:
    """Puts the codebook where the encoder's cells lie, so that pictures have many codes."""
    cells = vqmodel.quant_conv(vqmodel.encoder(pictures(40))).movedim(1, -1).flatten(0, -2)
    chosen = torch.randperm(len(cells), generator=generator)[:NUM_CODES]
    vqmodel.quantize.embedding.weight.copy_(cells[chosen])


def pictures(count: int, seed: int = 0) -> Tensor:
    """``(count, 3, 8, 8)`` in [-1, 1]."""
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def publish(model: ChameleonForConditionalGeneration, folder: Path, **options: Any) -> Path:
    """The model in the layout it is published in, with its tokenizer."""
    model.save_pretrained(folder, **options)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=model.config.vocabulary_map, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, PAD, EOS, "<unk>", END, BEGIN, TURN, "<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=1).save_pretrained(folder)
    return folder


def decoder_tensors() -> dict[str, Tensor]:
    """The decoder of the codes under its published names, drawn."""
    torch.manual_seed(3)
    form = VqAutoencoder.Config(
        image_size=SIDE,
        channels=32,
        multipliers=(1, 2),
        num_blocks=1,
        attention_sizes=(4,),
        latent_channels=8,
        code_channels=8,
        num_codes=NUM_CODES,
    )
    held = form.build().state_dict()
    return {f"model.vqmodel.{name}": held[name] for name in held if name.startswith("decoder.")}
