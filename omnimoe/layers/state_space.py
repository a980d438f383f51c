"""A selective state space (Mamba) in the place of attention, whose projections are banks.

Projections by modality make Mixture-of-Mamba; shared ones make Mamba. The convolution, the decay rates and the scan are
shared, and run over the whole sequence in order of time: what came before is one state of fixed size.

Sources: Mamba, https://arxiv.org/abs/2312.00752; Mixture-of-Mamba, https://arxiv.org/abs/2501.16295.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers.attention import BaseAttention, register_attention
from omnimoe.layers.bank import TowerMap, begin, resolve_towers
from omnimoe.layers.linear import BankLinear
from omnimoe.layers.masks import AttentionMask
from omnimoe.layers.rows import RowLayout
from omnimoe.ops import selective_scan

SITES = ("in_proj", "x_proj", "dt_proj", "out_proj")
RULES = ("causal", "block_causal", "prefix")
"""Mask rules that hide nothing of what came before; what they show of later positions a state does not see."""


@register_attention("state_space")
class StateSpace(BaseAttention):
    """Mamba's mixer: a short convolution and a selective scan between two gated projections."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseAttention.Config):
        """A selective state space."""

        state_size: int = 16
        """Numbers S that each channel remembers."""
        conv_size: int = 4
        """Positions that the convolution sees, the newest included."""
        expand: int = 2
        """Channels I as a multiple of ``hidden_size``."""
        step_rank: int | None = None
        """Width through which the step sizes are made; ``hidden_size / 16``, rounded up, where None."""
        bias: bool = False
        """Biases on the projections in and out."""
        conv_bias: bool = True
        """A bias on the convolution."""
        step_min: float = 1e-3
        """Smallest step size that a new channel starts with."""
        step_max: float = 0.1
        """Largest."""
        step_floor: float = 1e-4
        """What a smaller one is raised to."""
        towers: TowerMap = "shared"
        """The copy each key's rows meet, at every projection that ``site_towers`` does not name."""
        site_towers: dict[str, TowerMap] = field(default_factory=dict)
        """Tower maps of single projections: in_proj, x_proj, dt_proj, out_proj."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, least in (("state_size", 1), ("conv_size", 2), ("expand", 1), ("step_rank", 1)):
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ConfigError(f"{name} must be at least {least}, got {value}")
            if not 0 < self.step_min <= self.step_max or not 0 < self.step_floor < math.inf:
                raise ConfigError(
                    f"steps must be positive, step_min at most step_max, got step_min {self.step_min}, step_max "
                    f"{self.step_max}, step_floor {self.step_floor}"
                )
            unknown = set(self.site_towers) - set(SITES)
            if unknown:
                raise ConfigError(f"unknown sites {sorted(unknown)} in site_towers; known: {', '.join(SITES)}")

        @property
        def needs_key_order(self) -> bool:
            return any(towers != "shared" for towers in (self.towers, *self.site_towers.values()))

        @property
        def cache_type(self) -> str:
            return "hybrid"

        def check_mask(self, rule: str, hides_blocks: bool) -> None:
            if rule not in RULES or hides_blocks:
                what = f"the mask rule {rule!r}" if rule not in RULES else "private blocks"
                raise ConfigError(
                    f"a state space carries all that came before forward in time, which {what} would not allow; set "
                    "mask='causal' and neither private_noise nor private_blocks"
                )

        def rank(self, hidden_size: int) -> int:
            """Width through which step sizes are made."""
            return self.step_rank or math.ceil(hidden_size / 16)

        def site_params(self, hidden_size: int) -> dict[str, int]:
            """Weights of one copy of each projection."""
            channels, rank = self.expand * hidden_size, self.rank(hidden_size)
            return {
                "in_proj": 2 * hidden_size * channels,
                "x_proj": channels * (rank + 2 * self.state_size),
                "dt_proj": rank * channels,
                "out_proj": channels * hidden_size,
            }

        def vector_params(self, hidden_size: int) -> int:
            """Weights outside of matrix products: convolution, rates, skip and biases."""
            biases = (2 * self.expand + 1) * hidden_size * self.bias
            return self.expand * hidden_size * (self.conv_size + self.conv_bias + self.state_size + 2) + biases

        def mixing_flops(self, hidden_size: int, length: int) -> int:
            """FLOP of a token's scan: 6 for each number of the state, whatever the length of the sequence."""
            return 6 * self.expand * hidden_size * self.state_size

    def __init__(self, config: StateSpace.Config, *, hidden_size: int, num_modalities: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.conv_size, self.state_size = config.conv_size, config.state_size
        self.step_rank = config.rank(hidden_size)
        channels = config.expand * hidden_size

        def towers(site: str) -> tuple[int, ...]:
            return resolve_towers(config.site_towers.get(site, config.towers), num_modalities)

        self.in_proj = RootLinear(towers("in_proj"), hidden_size, 2 * channels, config.bias)
        self.conv = ShortConvolution(channels, config.conv_size, config.conv_bias)
        self.x_proj = RootLinear(towers("x_proj"), channels, self.step_rank + 2 * config.state_size)
        self.dt_proj = StepLinear(towers("dt_proj"), self.step_rank, channels, config)
        self.rates = Rates(channels, config.state_size)
        self.out_proj = RootLinear(towers("out_proj"), channels, hidden_size, config.bias)

    def forward(self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any = None) -> Tensor:
        """Mixes positions.

        Args:
            x: ``(N, D)`` rows.
            rows: their layout.
            mask: gives the documents of a packed row; each begins with an empty state.
            cache: a transformers cache made from the model's config, or None.

        Returns:
            ``(N, D)`` rows.
        """
        if mask.block_ids is not None and mask.block_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            least = int(mask.block_ids.min()) if mask.block_ids.numel() else 0
            if least < -1:
                raise ValueError(
                    f"block_ids holds {least}, a private block, which a state space cannot hide from what follows"
                )
        history, state = self._remembered(cache)
        inner, gate = self.in_proj(x, rows).chunk(2, dim=-1)
        channels, history, starts = self.conv(rows.to_time(inner), rows.valid, mask.segment_ids, history)
        inner = rows.to_rows(channels)
        step, written = self.x_proj(inner, rows).split((self.step_rank, 2 * self.state_size), dim=-1)
        step = F.softplus(self.dt_proj(step, rows).float())
        into, out = rows.to_time(written).chunk(2, dim=-1)
        # padding comes out of to_time as a step of 0, which leaves the state as it is
        rate = -torch.exp(self.rates.A_log.float())
        y, state = selective_scan(channels, rows.to_time(step), rate, into, out, state, starts)
        if cache is not None:
            cache.update_conv_state(history, self.layer_idx)
            cache.update_recurrent_state(state, self.layer_idx)
            place = x.new_zeros(rows.batch_size, 1, rows.sequence_length, 1)
            cache.update(place, place, self.layer_idx)  # by which the cache counts
        y = rows.to_rows(y) + inner * self.rates.D.to(inner.dtype)
        return self.out_proj(y * F.silu(gate), rows)

    def _remembered(self, cache: Any) -> tuple[Tensor | None, Tensor | None]:
        """What entered the convolution last, ``(B, I, conv_size - 1)``, and the state ``(B, I, S)``."""
        if cache is None:
            return None, None
        held = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if not hasattr(held, "recurrent_states"):
            raise ValueError(
                f"layer {self.layer_idx} keeps a state, for which this {type(cache).__name__} has no place; make it "
                "from the model's config, DynamicCache(config=model.config), or leave past_key_values out"
            )
        return cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)


class ShortConvolution(nn.Module):
    """A causal convolution of each channel with itself, and SiLU. It steps over padding, wherever that stands.

    Args:
        channels: I.
        size: positions K that it sees.
        bias: add a bias.
    """

    def __init__(self, channels: int, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.initial = {"weight": _within_root, "bias": 0.0}
        begin(self)

    def forward(
        self, x: Tensor, valid: Tensor | None, segment_ids: Tensor | None, history: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(B, T, I)`` to the same shape.

        Args:
            x: zeros at padding.
            valid: ``(B·T,)`` bool, False at padding; None without.
            segment_ids: ``(B, T)``, documents, which do not see each other; None without.
            history: ``(B, I, K - 1)``, what entered before; zeros where None.

        Returns:
            ``(B, T, I)``; the history of what comes next; and, with documents, ``(B, T)`` bool, where one begins.
        """
        batch_size, length, channels = x.shape
        reach = self.weight.shape[1] - 1
        before = x.new_zeros(batch_size, reach, channels) if history is None else history.transpose(1, 2).to(x.dtype)
        whole = torch.cat((before, x), dim=1)
        documents = None if segment_ids is None else F.pad(segment_ids, (reach, 0), value=-1)
        back = None
        if valid is not None:
            # padding goes to the front, so that what counts stands side by side
            order = F.pad(valid.view(batch_size, length), (reach, 0), value=True).int().argsort(dim=1, stable=True)
            back = (order.argsort(dim=1)[:, reach:] - reach).clamp_min(0)
            whole = _taken(whole, order)
            documents = None if documents is None else documents.gather(1, order)
        weight = self.weight.to(x.dtype)
        y = whole[:, reach:] * weight[:, reach]
        for place in range(1, reach + 1):
            seen = whole[:, reach - place : -place]
            if documents is not None:
                seen = torch.where((documents[:, reach:] == documents[:, reach - place : -place]).unsqueeze(2), seen, 0)
            y = torch.addcmul(y, seen, weight[:, reach - place])
        y = F.silu(y if self.bias is None else y + self.bias.to(x.dtype))
        starts, history = None, whole[:, length:]
        if documents is not None:
            starts = documents[:, reach:] != documents[:, reach - 1 : -1]
            history = torch.where((documents[:, length:] == documents[:, -1:]).unsqueeze(2), history, 0)
        if back is not None:
            y = _taken(y, back)
            starts = None if starts is None else starts.gather(1, back)
        return y, history.transpose(1, 2), starts


class RootLinear(BankLinear):
    """A linear map that starts as Mamba's do: even within one over the root of what is summed."""

    def __init__(self, towers: tuple[int, ...], in_features: int, out_features: int, bias: bool = False) -> None:
        self.initial = {"weight": _within_root, "bias": 0.0}
        super().__init__(towers, in_features, out_features, bias)


class StepLinear(BankLinear):
    """The linear map to step sizes, whose bias starts at steps drawn between two bounds, evenly in their logarithm.

    Args:
        towers: the copy of each key, resolved.
        in_features: the rank R.
        out_features: channels I.
        config: gives the bounds.
    """

    def __init__(self, towers: tuple[int, ...], in_features: int, out_features: int, config: StateSpace.Config) -> None:
        self.initial = {"weight": _within_root, "bias": partial(_steps, config)}
        super().__init__(towers, in_features, out_features, bias=True)


class Rates(nn.Module):
    """How fast each number of the state decays, ``-exp(A_log)``, and how much of a channel passes by, ``D``.

    Args:
        channels: I.
        size: S.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, size))
        self.D = nn.Parameter(torch.empty(channels))
        self.initial = {"A_log": _counted, "D": 1.0}
        begin(self)


def _steps(config: StateSpace.Config, bias: Tensor) -> Tensor:
    """Step sizes between the bounds, the same in every copy, as what softplus makes them of."""
    low, high = math.log(config.step_min), math.log(config.step_max)
    steps = torch.exp(torch.rand(bias.shape[1:], device=bias.device) * (high - low) + low)
    steps = steps.clamp_min(config.step_floor)
    return (steps + torch.log(-torch.expm1(-steps))).expand_as(bias)


def _counted(rates: Tensor) -> Tensor:
    """1 to S in every channel, as logarithms."""
    return torch.arange(1, rates.shape[1] + 1, device=rates.device).log().expand_as(rates)


def _within_root(weight: Tensor) -> Tensor:
    """Even within one over the root of what is summed."""
    bound = weight.shape[-1] ** -0.5
    return torch.empty_like(weight).uniform_(-bound, bound)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """``(B, T, I)`` at ``(B, t)`` places."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))
