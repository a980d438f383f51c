"""Routing by attributes: a code of what a row is, not the row itself, decides which experts it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.base import register_router
from omnimoe.routers.scores import Scorer
from omnimoe.routers.top_k import TopKRouter


@register_router("attributes")
class AttributeRouter(TopKRouter):
    """Token choice that reads the bits of a row's key, so all rows of a key take the same experts at the same weights.

    Source: Uni-Perceiver-MoE, https://arxiv.org/abs/2206.04674: eight bits of task, role and modality, two of eight
    experts. The width of what the bits are mapped to is ours.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TopKRouter.Config):
        """Routing by attributes."""

        attributes_of_keys: tuple[tuple[int, ...], ...] = ()
        """The bits of each key, as many for each; its own bit alone where empty."""
        width: int = 16
        """What the bits are mapped to and normalised in, before experts are scored."""

        def __post_init__(self) -> None:
            super().__post_init__()
            lengths = {len(bits) for bits in self.attributes_of_keys}
            bits = {bit for code in self.attributes_of_keys for bit in code}
            if len(lengths) > 1 or 0 in lengths or not bits <= {0, 1}:
                raise ConfigError(
                    f"attributes_of_keys must be rows of 0 and 1 of one length, got {self.attributes_of_keys}"
                )
            self.check_positive("width")
            self.check_idle("attributes are read from the key and not from the row", "input_jitter")

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            return 0  # scored once for each key, not for each token

    config: AttributeRouter.Config

    def __init__(self, config: AttributeRouter.Config, *, num_modalities: int, **sizes: Any) -> None:
        super().__init__(config, num_modalities=num_modalities, **{**sizes, "hidden_size": config.width})
        own = tuple(tuple(int(i == j) for j in range(num_modalities)) for i in range(num_modalities))
        self.attributes = config.attributes_of_keys or own
        if len(self.attributes) != num_modalities:
            raise ConfigError(f"attributes_of_keys has {len(self.attributes)} codes for {num_modalities} keys")
        self.embed = Scorer(len(self.attributes[0]), config.width)
        self.norm = nn.LayerNorm(config.width)

    def logits(self, x: Tensor, rows: RowLayout) -> Tensor:
        """The ``(N, E)`` logits of the rows' keys; x is not read."""
        with torch.autocast(x.device.type, enabled=False):
            bits = torch.tensor(self.attributes, dtype=torch.float32, device=x.device)
            code = self.embed(bits)
            norm = self.norm
            code = nn.functional.layer_norm(
                code, (self.config.width,), norm.weight.float(), norm.bias.float(), norm.eps
            )
            return self.scorer(code)[rows.key_ids]
