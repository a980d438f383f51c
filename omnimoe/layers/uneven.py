"""Banks whose copies differ in width: one small bank a copy, each on columns of its own.

The residual stream is as wide as the widest tower. The rows of a narrower one fill its first columns and the rest is
zero, so that whatever works on rows sees one tensor, and a copy reads and writes the columns it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.config import ConfigError
from omnimoe.layers.bank import resolve_towers
from omnimoe.layers.linear import BankLinear
from omnimoe.layers.mlp import BankMLP
from omnimoe.layers.norm import Norm
from omnimoe.layers.rows import RowLayout

Width = int | tuple[int, ...]
"""One width for all copies, or that of each copy."""


def copy_widths(site: str, towers: tuple[int, ...], hidden_size: int, widths: tuple[int, ...]) -> Width:
    """How wide the rows of each copy are.

    Args:
        site: what has the copies, for the message.
        towers: the copy of each key, resolved.
        hidden_size: D, the width of the stream.
        widths: of the rows of each key; empty where all are D wide.

    Returns:
        One number where all copies agree.

    Raises:
        ConfigError: if keys of several widths share a copy.
    """
    if not widths:
        return hidden_size
    found: list[set[int]] = [set() for _ in range(max(towers) + 1)]
    for width, copy in zip(widths, towers, strict=True):
        found[copy].add(width)
    mixed = next((sorted(held) for held in found if len(held) > 1), None)
    if mixed:
        raise ConfigError(
            f"rows of the widths {' and '.join(map(str, mixed))} share a copy of {site}; give its tower map a copy for "
            f"each width, the widths are {widths}"
        )
    each = tuple(held.pop() for held in found)
    return each[0] if len(set(each)) == 1 else each


class Uneven(nn.Module):
    """Copies that differ in width.

    Args:
        towers: the copy of each key, resolved.
        copies: a bank of one copy for each.
        reads: columns of a row that each copy reads.
        width: columns of the result; those that a copy does not write are zero.
    """

    def __init__(self, towers: tuple[int, ...], copies: Sequence[nn.Module], reads: Width, width: int) -> None:
        super().__init__()
        self.towers = towers
        self.num_copies = len(copies)
        self.copies = nn.ModuleList(copies)
        self.reads = (reads,) * len(copies) if isinstance(reads, int) else reads
        self.width = width

    def forward(self, x: Tensor, rows: RowLayout) -> Tensor:
        """``(N, ...)`` rows to ``(N, width)``, each through the copy of its key.

        Where rows lie in memory is read back to the host, once in a forward. A traced graph reads nothing back: there
        every copy works on all rows, and each row keeps what its own copy made of it.
        """
        if torch.compiler.is_compiling():
            copy_of_row = torch.tensor(self.towers, device=x.device)[rows.key_ids]
            y = x.new_zeros(len(x), self.width)
            for copy in range(self.num_copies):
                y = torch.where((copy_of_row == copy).unsqueeze(1), self._through(copy, x), y)
            return y
        runs = rows.runs(self.towers)
        if not torch.is_grad_enabled():  # elsewhere a copy without rows takes part: its gradients are zero, not missing
            runs = [run for run in runs if run[1] > run[0]] or runs[:1]
        parts = [self._through(copy, x[start:stop]) for start, stop, copy in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _through(self, copy: int, x: Tensor) -> Tensor:
        y = self.apply_copy(copy, x[:, : self.reads[copy]])
        return F.pad(y, (0, self.width - y.shape[1])) if y.shape[1] < self.width else y

    def apply_copy(self, copy: int, x: Tensor) -> Tensor:
        """``(n, D)`` rows, their own columns alone, through a copy."""
        return self.copies[copy](x, None)


class UnevenNorm(Uneven):
    """RMSNorm over the columns that a row has."""

    def apply_copy(self, copy: int, x: Tensor) -> Tensor:
        """See :class:`Uneven`."""
        return self.copies[copy](x.contiguous(), None)


class UnevenMLP(Uneven):
    """Feed-forward networks of several widths."""

    def apply_copy(self, copy: int, x: Tensor) -> Tensor:
        """See :class:`Uneven`."""
        ends = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        return self.copies[copy](x.contiguous(), ends)


def _each(width: Width, count: int) -> tuple[int, ...]:
    return (width,) * count if isinstance(width, int) else width


def linear_bank(
    towers: tuple[int, ...], in_features: Width, out_features: Width, bias: bool = False
) -> BankLinear | Uneven:
    """Linear maps, one a copy; a plain bank where all are of one shape."""
    if isinstance(in_features, int) and isinstance(out_features, int):
        return BankLinear(towers, in_features, out_features, bias)
    count = max(towers) + 1
    into, out = _each(in_features, count), _each(out_features, count)
    alone = (0,) * len(towers)
    copies = [BankLinear(alone, *shape, bias) for shape in zip(into, out, strict=True)]
    return Uneven(towers, copies, into, max(out))


def mlp_bank(
    towers: tuple[int, ...], width: Width, intermediate_size: Width, hidden_size: int, **options: Any
) -> BankMLP | UnevenMLP:
    """Feed-forward networks, one a copy; a plain bank where all are of one shape.

    Args:
        towers: the copy of each key, resolved.
        width: of the rows of each copy.
        intermediate_size: of each copy.
        hidden_size: D, the width of the stream.
        options: of every network.
    """
    count = max(towers) + 1
    if isinstance(width, int) and isinstance(intermediate_size, int):
        return BankMLP(count, width, intermediate_size, **options)
    widths, inner = _each(width, count), _each(intermediate_size, count)
    copies = [BankMLP(1, *shape, **options) for shape in zip(widths, inner, strict=True)]
    return UnevenMLP(towers, copies, widths, hidden_size)


def build_norm(
    config: Norm.Config, *, hidden_size: int, num_modalities: int, widths: tuple[int, ...] = ()
) -> Norm | UnevenNorm:
    """The norm of a config, over rows that may differ in width.

    Args:
        config: of the norm.
        hidden_size: D, the width of the stream.
        num_modalities: number of keys.
        widths: of the rows of each key; empty where all are D wide.
    """
    towers = resolve_towers(config.towers, num_modalities)
    width = copy_widths("a norm", towers, hidden_size, widths)
    if isinstance(width, int):
        return config.build(hidden_size=width, num_modalities=num_modalities)
    alone = config.replace(towers="shared")
    copies = [alone.build(hidden_size=own, num_modalities=num_modalities) for own in width]
    return UnevenNorm(towers, copies, width, hidden_size)
