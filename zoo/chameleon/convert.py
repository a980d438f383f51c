"""Chameleon's checkpoints: a decoder over words and picture codes, and the autoencoder of the codes beside it.

Which ids are codes, and of which entry of the codebook, is written in the words of the vocabulary: ``IMGIMGBDZ`` is
code 13, a letter a digit. The same map names the begin and end of a document and of a picture; ``bos_token_id`` of the
published config is the padding of that map and is not read where the map knows better.

transformers' conversion left the decoder of the codes out; a checkpoint that has it, under ``model.vqmodel.decoder``,
is read with it. Its config says nothing of that, so the names of the weights are asked.

Source of the layout: the classes ``Chameleon*`` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from omnimoe import Attention, CheckpointError, FeedForward, Norm, OmniMoeConfig, Tokens
from omnimoe.convert import Converter, Rule, register_converter, rename
from omnimoe.convert.converter import CONFIG, JsonFiles
from omnimoe.convert.decoders import activation, read_config, refuse, rope_of
from omnimoe.convert.files import stored_names
from omnimoe.convert.tables import ROTARY_TABLES, dense_rules, tied_head
from omnimoe.modalities import CodedPictures
from omnimoe.tokenizers.vq_autoencoder import VqAutoencoder

BOS, EOS, PAD, BEGIN, END, TURN = "<s>", "</s>", "<pad>", "<racm3:break>", "<eoss>", "<reserved08706>"
"""Words of the vocabulary: of a document its begin, end and padding, of a picture its begin and end, and the end of
what a person says."""
CODE = re.compile(r"IMGIMG([A-J]+)Z")
_LETTERS, _DIGITS = str.maketrans("0123456789", "ABCDEFGHIJ"), str.maketrans("ABCDEFGHIJ", "0123456789")
DECODER = "decoder"
"""Field of the published ``vq_config`` that says whether the weights have a decoder; none is published with it."""
_PREFIX = "model.vqmodel."


def code_of(word: str) -> int | None:
    """The picture code that a word of the vocabulary stands for, or None.

    Example:
        >>> code_of("IMGIMGBDZ"), code_of("apple")
        (13, None)
    """
    found = CODE.fullmatch(word)
    return None if found is None else int(found[1].translate(_DIGITS))


def word_of(code: int) -> str:
    """The inverse of :func:`code_of`.

    Example:
        >>> word_of(13)
        'IMGIMGBDZ'
    """
    return f"IMGIMG{str(code).translate(_LETTERS)}Z"


def chameleon_config(files: JsonFiles) -> OmniMoeConfig:
    """Our config for a published one."""
    config = read_config({**files[CONFIG], "model_type": "chameleon"})
    refuse(config, mlp_bias=False, hidden_act="silu")
    words = config.vocabulary_map
    if not words:
        raise CheckpointError("the config has no vocabulary_map, which says which ids are codes of pictures")
    norm = Norm.Config(eps=config.rms_norm_eps)
    return OmniMoeConfig(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        modalities=(
            Tokens.Config(name="text", vocab_size=config.vocab_size),
            _pictures(words, _autoencoder(config.vq_config, files[CONFIG].get("vq_config") or {}), config.vocab_size),
        ),
        attention=Attention.Config(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm="layer",
            rope=rope_of(config),
        ),
        experts=FeedForward.Config(
            intermediate_size=config.intermediate_size, activation=activation(config.hidden_act)
        ),
        norm=norm,
        final_norm=norm,
        norm_placement="post" if config.swin_norm else "pre",
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        max_position_embeddings=config.max_position_embeddings,
        pad_token_id=words.get(PAD, config.pad_token_id),
        bos_token_id=words.get(BOS, config.bos_token_id),
        eos_token_id=words.get(EOS, config.eos_token_id),
    )


def _autoencoder(vq: Any, plain: Mapping[str, Any]) -> VqAutoencoder.Config:
    refuse(vq, double_latent=False, in_channels=3)
    # transformers places attention inside of the levels only where attn_type asks for it
    has_attention = vq.attn_type == "vanilla"
    return VqAutoencoder.Config(
        image_size=vq.resolution,
        channels=vq.base_channels,
        multipliers=tuple(vq.channel_multiplier),
        num_blocks=vq.num_res_blocks,
        attention_sizes=tuple(vq.attn_resolutions or ()) if has_attention else (),
        middle_attention=has_attention,
        latent_channels=vq.latent_channels,
        code_channels=vq.embed_dim,
        num_codes=vq.num_embeddings,
        has_decoder=bool(plain.get(DECODER, False)),
    )


def _pictures(words: Mapping[str, int], autoencoder: VqAutoencoder.Config, vocab_size: int) -> CodedPictures.Config:
    rows = {row: code for word, row in words.items() if (code := code_of(word)) is not None}
    start, count = min(rows, default=0), len(rows)
    if count != autoencoder.num_codes or sorted(rows.values()) != list(range(count)):
        raise CheckpointError(
            f"the vocabulary_map names {count} codes of pictures, and the autoencoder has {autoencoder.num_codes}"
        )
    if max(rows) - start + 1 != count:
        raise CheckpointError(
            f"the codes of pictures are scattered over the ids {start} to {max(rows)}, and only codes that lie "
            "together are converted"
        )
    if max(rows) >= vocab_size:
        raise CheckpointError(f"the vocabulary_map has id {max(rows)}, and the vocabulary {vocab_size} rows")
    codes = tuple(rows[start + place] for place in range(count))
    missing = [word for word in (BEGIN, END) if word not in words]
    if missing:
        raise CheckpointError(f"the vocabulary_map has no {missing[0]}, which stands around a picture")
    return CodedPictures.Config(
        name="image",
        vocab_start=start,
        vocab_size=count,
        begin_id=words[BEGIN],
        end_id=words[END],
        num_tokens=autoencoder.side**2,
        autoencoder=autoencoder,
        codes=() if codes == tuple(range(count)) else codes,
    )


def chameleon_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table."""
    yield from dense_rules(config)
    with torch.device("meta"):
        held = config.modalities[1].autoencoder.build().state_dict()
    for name in held:
        yield rename(f"model.modalities.image.autoencoder.{name}", f"{_PREFIX}{name}")


class ChameleonConverter(Converter):
    """A converter that asks the names of the weights whether codes can be made pictures again."""

    def read(self, folder: Path) -> OmniMoeConfig:
        config = super().read(folder)
        if any(name.startswith(f"{_PREFIX}decoder.") for name in stored_names(folder)):
            config = self.config_of(with_decoder(config.published["files"][CONFIG]))
        return config


def with_decoder(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The published config of a checkpoint that has the decoder of its codes."""
    return {**plain, "vq_config": {**(plain.get("vq_config") or {}), DECODER: True}}


CHAMELEON = register_converter(
    ChameleonConverter(
        name="chameleon",
        model_types=("chameleon", "anole"),
        config=chameleon_config,
        rules=chameleon_rules,
        tied=tied_head,
        ignored=ROTARY_TABLES,
        beside=("vqgan.safetensors",),
        notice="Chameleon's weights are under the Chameleon Research License: for research, not for commercial use",
        license="Chameleon Research License",
    )
)
