"""Normalisations as banks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable
from omnimoe.layers.bank import Bank, TowerMap, resolve_towers, select
from omnimoe.layers.rows import RowLayout
from omnimoe.ops import rms_norm


class BankRMSNorm(Bank):
    """RMSNorm with one scale a tower; statistics in float32.

    Args:
        towers: the copy of each key, resolved.
        width: length of the normalised axis.
        eps: added to the mean square.
        offset: added to the stored scale, which then starts lower by it; the product is taken in float32.
    """

    initial = {"weight": 1.0}

    def __init__(self, towers: tuple[int, ...], width: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__(towers)
        self.eps = eps
        self.offset = offset
        if offset:
            self.initial = {"weight": 1.0 - offset}
        self.weight = nn.Parameter(torch.empty(self.num_copies, width))
        self.reset_parameters()

    def forward(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, ..., D)`` rows to the same shape and dtype."""
        if self.offset:
            return self._shifted(x, rows)
        if self.num_copies == 1:
            return rms_norm(x, self.weight, None, self.eps)
        weight, ends = select(self.weight, self.towers, rows)
        return rms_norm(x, weight, ends, self.eps)

    def _shifted(self, x: Tensor, rows: RowLayout) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, ends = self.weight.to(wide) + self.offset, None
        if self.num_copies > 1:
            scale, ends = select(scale, self.towers, rows)
        return rms_norm(x.to(wide), scale, ends, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"copies={self.num_copies}, width={self.weight.shape[1]}, eps={self.eps}"


class BankJointRMSNorm(BankRMSNorm):
    """RMSNorm over all heads of a row together, with a scale of its own for every head, as OLMoE's q/k norm.

    Source: https://arxiv.org/abs/2409.02060.
    """

    def forward(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, H, C)`` rows to the same shape and dtype."""
        return super().forward(x.flatten(1), rows).view_as(x)


class BankLayerNorm(Bank):
    """LayerNorm with one scale and one shift a tower.

    Args:
        towers: the copy of each key, resolved.
        shape: of the scale of a copy; its last axis is normalised.
        eps: added to the variance.
    """

    initial = {"weight": 1.0, "bias": 0.0}

    def __init__(self, towers: tuple[int, ...], shape: tuple[int, ...], eps: float = 1e-5) -> None:
        super().__init__(towers)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(self.num_copies, *shape))
        self.bias = nn.Parameter(torch.empty(self.num_copies, *shape))
        self.reset_parameters()

    def forward(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, *shape)`` rows to the same shape and dtype."""
        if self.weight.ndim == 2 and x.device.type == "cpu" and len(x) and not torch.compiler.is_compiling():
            return self._by_runs(x, rows)
        normal = F.layer_norm(x, x.shape[-1:], eps=self.eps).to(x.dtype)
        if self.num_copies == 1:
            return torch.addcmul(self.bias.to(x.dtype), normal, self.weight.to(x.dtype))
        ends = rows.segments(self.towers)[0]
        run = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=torch.int32), right=True)
        copies = torch.tensor(rows.segments(self.towers)[1], device=x.device)
        copy = copies[run.clamp(max=len(copies) - 1)]  # a traced graph keeps rows past the last run
        return torch.addcmul(self.bias.to(x.dtype)[copy], normal, self.weight.to(x.dtype)[copy])

    def _by_runs(self, x: Tensor, rows: RowLayout) -> Tensor:
        """In one pass a run of rows, where the host may read how long it is."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        ends, copies = ([len(x)], [0]) if self.num_copies == 1 else rows.segments(self.towers)
        lengths = torch.as_tensor(ends).diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
        parts = [
            F.layer_norm(part, part.shape[-1:], weight[copy], bias[copy], self.eps)
            for part, copy in zip(x.split(lengths), copies, strict=True)
            if len(part)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extra_repr(self) -> str:
        copies, *shape = self.weight.shape
        return f"copies={copies}, shape={tuple(shape)}, eps={self.eps}"


class BankHeadLayerNorm(BankLayerNorm):
    """LayerNorm over each head with a scale and a shift of its own for every head, as Chameleon's q/k norm.

    Args:
        towers: the copy of each key, resolved.
        num_heads: H.
        head_dim: C.
        eps: added to the variance.

    Source: https://arxiv.org/abs/2405.09818.
    """

    def __init__(self, towers: tuple[int, ...], num_heads: int, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__(towers, (num_heads, head_dim), eps)

    def extra_repr(self) -> str:
        copies, num_heads, head_dim = self.weight.shape
        return f"copies={copies}, num_heads={num_heads}, head_dim={head_dim}, eps={self.eps}"


NORM_FORMS = ("rms", "layer")


class Norm(BankRMSNorm, Configurable):
    """The norm of a block's branch, or the final norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """RMSNorm, or LayerNorm."""

        form: str = "rms"
        """``"rms"``, or ``"layer"`` for a LayerNorm with scale and shift."""
        eps: float = 1e-5
        """Added to the mean square, or to the variance."""
        offset: float = 0.0
        """Added to the stored scale: 1 where weights are kept as differences from 1, as Gemma's are."""
        towers: TowerMap = "shared"
        """The copy each key's rows meet."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.form not in NORM_FORMS:
                raise ConfigError(f"unknown form of norm {self.form!r}; known: {', '.join(NORM_FORMS)}")
            if self.form == "layer" and self.offset:
                raise ConfigError(f"offset {self.offset} is of the scale of an RMSNorm; leave it 0 with form 'layer'")

        def build(self, **built: Any) -> Any:
            """The norm, given ``hidden_size`` and ``num_modalities``."""
            if self.form == "rms":
                return super().build(**built)
            return BankLayerNorm(
                resolve_towers(self.towers, built["num_modalities"]), (built["hidden_size"],), self.eps
            )

    def __init__(self, config: Norm.Config, *, hidden_size: int, num_modalities: int) -> None:
        super().__init__(resolve_towers(config.towers, num_modalities), hidden_size, config.eps, config.offset)
