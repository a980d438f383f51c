"""Latent rows whose time of noise goes through a small network, which several modalities may share (Cosmos3).

A row at time 0 is clean, a condition, and carries no code of a time; nothing is predicted there. Where a row stands is
told by rotary positions alone. Actions differ from one kind of machine to the next, so each has maps of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.modalities.base import Modality, register_modality
from omnimoe.modalities.patches import Patches, sine_code


@register_modality("timed_patches")
class TimedPatches(Patches):
    """A linear map in and out with biases, and a learned code of the time at rows with noise.

    Source: https://arxiv.org/abs/2606.02800.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Patches.Config):
        """A continuous modality of rows with a time each."""

        objective: str = "flow"
        """As for patches."""
        loss_weight: float = 1.0
        """Weight of the mean squared error in ``out.loss``."""
        time_width: int = 256
        """Width of the sines and cosines of the time."""
        time_of: str | None = None
        """Modality whose network of the time this one uses too; one of its own where None."""
        is_marked: bool = False
        """Add an embedding of the modality to every row."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.time_width < 2 or self.time_width % 2:
                raise ConfigError(f"time_width must be even and at least 2, got {self.time_width}")
            if self.time_of == self.name:
                raise ConfigError(f"modality {self.name!r} names itself as time_of; leave it None")

        def active_params(self, hidden_size: int) -> int:
            return (2 * self.channels + self.time_width + hidden_size) * hidden_size

    initial = {"in_proj": "normal", "in_bias": 0.0, "out_proj": 0.0, "out_bias": 0.0, "marker": 0.0}

    config: TimedPatches.Config

    def __init__(self, config: TimedPatches.Config, *, hidden_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size)
        self.in_bias = nn.Parameter(torch.zeros(hidden_size))
        self.out_bias = nn.Parameter(torch.zeros(config.channels))
        self.marker = nn.Parameter(torch.zeros(hidden_size)) if config.is_marked else None
        # In a list, so that what another modality owns is no submodule of this one too.
        self._timed: list[TimedPatches] = []
        if config.time_of is None:
            self.time_in = nn.Linear(config.time_width, hidden_size)
            self.time_out = nn.Linear(hidden_size, hidden_size)

    def meet(self, modalities: Mapping[str, Modality]) -> None:
        """Finds the modality whose network of the time is shared.

        Raises:
            ConfigError: if there is none of that name with a network of its own.
        """
        name = self.config.time_of
        if name is None:
            return
        owner = modalities.get(name)
        if not isinstance(owner, TimedPatches) or owner.config.time_of is not None:
            raise ConfigError(
                f"modality {self.config.name!r} takes the network of the time from {name!r}, which has none; name one "
                "of timed patches that has its own"
            )
        self._timed = [owner]

    def embed(self, inputs: Any, timesteps: Tensor | None = None) -> Tensor:
        """Latent rows to model rows.

        Args:
            inputs: ``(n, C)``.
            timesteps: ``(n,)`` in [0, 1], 0 clean and 1 noise; None for clean rows.

        Returns:
            ``(n, D)``.
        """
        x = F.linear(inputs.to(self.in_proj.dtype), self.in_proj, self.in_bias)
        return self._placed_in_time(x, timesteps)

    def head(self, x: Tensor) -> Tensor:
        """``(n, D)`` to ``(n, C)``."""
        return F.linear(x, self.out_proj, self.out_bias)

    def _placed_in_time(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        x = x if self.marker is None else x + self.marker
        times = torch.zeros(len(x), device=x.device) if timesteps is None else timesteps.to(x.device)
        owner = self._timed[0] if self._timed else self
        code = sine_code(times, owner.config.time_width)
        # in float32 whatever the weights are in: neighbouring times differ by little
        for layer, turn in ((owner.time_in, F.silu), (owner.time_out, nn.Identity())):
            code = turn(F.linear(code, layer.weight.float(), layer.bias.float()))
        return x + torch.where(times.unsqueeze(1) > 0, code, 0).to(x.dtype)


@register_modality("domain_patches")
class DomainPatches(TimedPatches):
    """Timed rows whose maps in and out belong to a domain: the kind of machine that acts.

    Features come as ``{"rows": (S, t, C), "domains": (S,)}``, S spans of one length; or as a tensor ``(S, ..., C)``,
    all of domain 0. Times are those of rows ``(n,)`` or of spans ``(S,)``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TimedPatches.Config):
        """A continuous modality of rows of several domains."""

        num_domains: int = 32
        """Domains G."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.num_domains < 1:
                raise ConfigError(f"num_domains must be at least 1, got {self.num_domains}")

        @property
        def has_own_form(self) -> bool:
            return True

    config: DomainPatches.Config

    def __init__(self, config: DomainPatches.Config, *, hidden_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size)
        domains, channels = config.num_domains, config.channels
        self.in_proj = nn.Parameter(torch.empty(domains, hidden_size, channels))
        self.in_bias = nn.Parameter(torch.zeros(domains, hidden_size))
        self.out_proj = nn.Parameter(torch.empty(domains, channels, hidden_size))
        self.out_bias = nn.Parameter(torch.zeros(domains, channels))
        self.reset_parameters()

    def embed(self, inputs: Any, timesteps: Tensor | None = None) -> Tensor:
        """Spans of rows to ``(S t, D)``; see the class."""
        rows, domains = self._spans(inputs)
        x = torch.baddbmm(self.in_bias[domains].unsqueeze(1), rows, self.in_proj[domains].transpose(1, 2))
        return self._placed_in_time(x.flatten(0, 1), self.noise_of_rows(inputs, timesteps))

    def predict(self, x: Tensor, given: Any) -> Tensor:
        """``(S t, D)`` to ``(S t, C)``, by the maps of the domains of ``given``."""
        rows, domains = self._spans(given)
        bias, weight = self.out_bias[domains].unsqueeze(1), self.out_proj[domains]
        return torch.baddbmm(bias, x.view(len(rows), -1, x.shape[1]), weight.transpose(1, 2)).flatten(0, 1)

    def rows_of(self, given: Any) -> Tensor:
        """Targets in the form of the features, or ``(n, C)``, to ``(n, C)``."""
        return given if isinstance(given, Tensor) and given.ndim == 2 else self._spans(given)[0].flatten(0, 1)

    def row_counts(self, given: Any) -> list[int]:
        """How many positions each span of ``given`` takes."""
        rows, _ = self._spans(given)
        return [rows.shape[1]] * len(rows)

    def refilled(self, given: Any, rows: Tensor) -> Any:
        """Spans in the form of ``given`` that hold ``rows (n, C)``."""
        held, domains = self._spans(given)
        return {"rows": rows.view_as(held), "domains": domains}

    def noise_of_rows(self, given: Any, timesteps: Tensor | None) -> Tensor | None:
        """``(n,)``, the time of each row of ``given``."""
        if timesteps is None:
            return None
        rows, _ = self._spans(given)
        if timesteps.shape not in ((len(rows),), (rows.shape[0] * rows.shape[1],)):
            raise ValueError(
                f"timesteps[{self.config.name!r}] must be ({rows.shape[0] * rows.shape[1]},), one for each row, or "
                f"({len(rows)},), one for each span, got {tuple(timesteps.shape)}"
            )
        return timesteps.repeat_interleave(rows.shape[0] * rows.shape[1] // len(timesteps))

    def _spans(self, given: Any) -> tuple[Tensor, Tensor]:
        name, channels, count = self.config.name, self.config.channels, self.config.num_domains
        rows, domains = (given.get("rows"), given.get("domains")) if isinstance(given, Mapping) else (given, None)
        if not isinstance(rows, Tensor) or rows.ndim < 3 or rows.shape[-1] != channels or not len(rows):
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"features[{name!r}] must be {{'rows': (spans, n, {channels}), 'domains': (spans,)}}, got rows {got}"
            )
        rows = rows.flatten(1, -2).to(self.in_proj)
        if domains is None:
            domains = torch.zeros(len(rows), dtype=torch.int64)
        fits = isinstance(domains, Tensor) and domains.shape == (len(rows),) and not domains.is_floating_point()
        if not fits or int(domains.min()) < 0 or int(domains.max()) >= count:
            raise ValueError(
                f"domains of features[{name!r}] must be ({len(rows)},) integers in [0, {count}), one for each span, "
                f"got {domains.tolist() if isinstance(domains, Tensor) else domains!r}"
            )
        return rows, domains.to(rows.device)
