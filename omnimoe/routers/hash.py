"""Hash routing: the experts of a row stand in a table, by the id of its token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.layers import RowLayout
from omnimoe.routers.balance import LOSS_COEFS
from omnimoe.routers.base import Routing, register_router
from omnimoe.routers.top_k import TopKRouter

TABLES = ("balanced", "random")
OF_THE_CHOICE = ("top_p", "num_groups", "num_groups_kept", "group_score", "expert_bias")
OF_THE_SCORES = (
    *LOSS_COEFS,
    "score",
    "normalize",
    "normalize_min",
    "logit_bias",
    "keep_float32",
    "zero_keeps_share",
    "noise",
    "later_choice_threshold",
    "input_jitter",
    "capacity_factor",
    "capacity",
)


@register_router("hash")
class HashRouter(TopKRouter):
    """The choice is looked up, the weights are learned scores of what was chosen, or all alike.

    The table is a buffer, so a model may be given a table of its own, by frequency or by clusters of ids.

    Source: hash layers, https://arxiv.org/abs/2106.04426; with learned weights DeepSeek-V4.
    """

    table: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(TopKRouter.Config):
        """Hash routing."""

        num_ids: int = 0
        """Ids in the table, the model's vocabulary."""
        top_k: int = 1
        """Experts of a row."""
        load_balance_coef: float = 0.0
        """Coefficient of the load-balance loss, which moves the learned scores alone."""
        is_learned: bool = True
        """Weigh by learned scores; otherwise each of the K chosen experts has weight 1/K."""
        table: str = "balanced"
        """How the table is drawn: each expert gets as many ids, ``"balanced"``, or each id is drawn for itself,
        ``"random"``."""
        seed: int = 0
        """Of the draw."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.num_ids < 1:
                raise ConfigError(f"num_ids must be the size of the vocabulary, got {self.num_ids}")
            if self.table not in TABLES:
                raise ConfigError(f"unknown table {self.table!r}; known: {', '.join(TABLES)}")
            self.check_idle("a hash table chooses by the id alone", *OF_THE_CHOICE)
            if not self.is_learned:
                self.check_idle("without learned scores all choices weigh alike and none is dropped", *OF_THE_SCORES)

        @property
        def takes_gated_experts(self) -> bool:
            return self.is_learned and super().takes_gated_experts

        @property
        def num_token_ids(self) -> int:
            return self.num_ids

        def router_params(self, hidden_size: int, num_experts: int, modality: int | None = None) -> int:
            return super().router_params(hidden_size, num_experts, modality) if self.is_learned else 0

    config: HashRouter.Config

    def __init__(self, config: HashRouter.Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        self.register_buffer("table", self.initial_buffers()["table"])
        if not config.is_learned:
            del self.scorer

    def initial_buffers(self) -> dict[str, Tensor]:
        """The table, drawn by its seed: K different experts for each id."""
        config, count = self.config, self.num_experts + self.num_free
        generator = torch.Generator().manual_seed(config.seed)
        if config.table == "random":
            drawn = torch.rand(config.num_ids, count, generator=generator, device="cpu").topk(config.top_k).indices
        else:
            first = torch.randperm(config.num_ids, generator=generator, device="cpu") % count
            steps = torch.randperm(count, generator=generator, device="cpu")[: config.top_k]
            drawn = (first.unsqueeze(1) + steps) % count
        return {**super().initial_buffers(), "table": drawn.to(torch.get_default_device())}

    def forward(self, x: Tensor, rows: RowLayout) -> Routing:
        """``(N, D)`` rows to N·K entries, the K of a row side by side."""
        if self.config.is_learned:
            return super().forward(x, rows)
        chosen = self.choose(x, rows)
        token_index = torch.arange(len(x), device=x.device).repeat_interleave(self.config.top_k)
        weight = self.config.routed_scaling_factor / self.config.top_k
        return Routing(token_index, chosen.reshape(-1), x.new_full((chosen.numel(),), weight), key_ids=rows.key_ids)

    def choose(self, scores: Tensor, rows: RowLayout) -> Tensor:
        """``(N, K)``, the entries of the rows' ids."""
        if rows.token_ids is None:
            raise ValueError("a hash table is read by token ids, and the rows carry none; pass input_ids to the model")
        return self.table[rows.token_ids]
