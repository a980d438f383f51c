"""What a connector is: rows of features in, rows of the model's width out, as many or fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import Configurable, register
from omnimoe.registry import Registry

CONNECTORS: Registry[type[Connector]] = Registry("connector")


def register_connector(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`Connector` class under ``name``.

    Raises:
        RegistryError: if the name is malformed or taken.
    """
    return register(CONNECTORS, name, exist_ok=exist_ok)


class Connector(nn.Module, Configurable):
    """Base of all connectors.

    Contract: ``__init__(config, *, channels, hidden_size)`` and ``forward(x (B, n, C), mask (B, n) or None) ->
    (B, m, D)``, with ``m = num_rows(n)``. Where an output row stands for certain input rows, :meth:`row_mask` says
    which of them are padding.
    """

    registry: ClassVar[Registry | None] = CONNECTORS

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """A connector."""

        def active_params(self, channels: int, hidden_size: int) -> int:
            """Weights in matrix products that one of its output rows meets."""
            return 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features to rows of the model.

        Args:
            x: ``(B, n, C)`` floating point.
            mask: ``(B, n)`` bool, False at padding; None where nothing is padding.

        Returns:
            ``(B, m, D)``; what stands at padding does not matter.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward(x, mask) -> (B, m, D)")

    def num_rows(self, length: int) -> int:
        """How many rows ``length`` rows of features become: as many, unless a connector says otherwise."""
        return length

    def row_mask(self, mask: Tensor) -> Tensor:
        """Which output rows are none of padding: ``(B, n)`` bool to ``(B, m)`` bool."""
        return mask
