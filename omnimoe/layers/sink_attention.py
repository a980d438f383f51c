"""Attention with a learned place to attend to nothing, and layers that see the latest positions alone: gpt-oss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers.attention import Attention, register_attention
from omnimoe.layers.masks import AttentionMask


@register_attention("sink_attention")
class SinkAttention(Attention):
    """Grouped-query attention whose softmax has one more place, of a learned score and no value.

    It is computed in plain operations under every attention implementation.

    Source: https://arxiv.org/abs/2508.10925.
    """

    initial = {"sinks": "normal"}

    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        """Attention with sinks."""

        window: int | None = None
        """Positions that a query sees at most, its own among them; None for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.window is not None and self.window < 1:
                raise ConfigError(f"window must be at least 1, got {self.window}")

        @property
        def tp_plan(self) -> dict[str, str]:
            return {}

    def __init__(self, config: SinkAttention.Config, *, hidden_size: int, num_modalities: int, layer_idx: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_modalities=num_modalities, layer_idx=layer_idx)
        self.window = config.window
        self.sinks = nn.Parameter(torch.zeros(config.num_heads))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor | None]:
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        scores = (query @ key.transpose(2, 3)) * self.scaling
        if not mask.needs_no_mask:
            scores = scores + mask.additive(scores.dtype)
        if self.window is not None:
            order = torch.arange(query.shape[2], device=query.device) + mask.past_length
            distance = order.unsqueeze(1) - torch.arange(key.shape[2], device=query.device)
            scores = scores.masked_fill(distance >= self.window, torch.finfo(scores.dtype).min)
        nothing = self.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat((scores, nothing), dim=-1), dim=-1, dtype=torch.float32)
        weights = weights[..., :-1].to(value.dtype)
        return (weights @ value).transpose(1, 2), weights
