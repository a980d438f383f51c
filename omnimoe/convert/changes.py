"""What happens to a published tensor on its way into a bank: its numbers are put in another order, never changed.

So every change has an exact inverse, and what is written back has the bits that were read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Change:
    """A reordering of the numbers of a tensor; this one leaves them as they are."""

    def into(self, tensor: Tensor) -> Tensor:
        """From the published form to ours."""
        return tensor

    def back(self, tensor: Tensor) -> Tensor:
        """From ours to the published form."""
        return tensor


AS_IS = Change()


@dataclass(frozen=True)
class Transpose(Change):
    """The last two axes change places: published ``(in, out)``, ours ``(out, in)``."""

    def into(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)


@dataclass(frozen=True)
class Permute(Change):
    """The axes in another order: the kernel of a convolution with its channels last.

    Args:
        order: the published axis that each of ours is.
    """

    order: tuple[int, ...]

    def into(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order)

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.permute(tuple(self.order.index(axis) for axis in range(len(self.order))))


@dataclass(frozen=True)
class Reshape(Change):
    """The same numbers in the same order under another shape, such as the kernel of a convolution over patches.

    Args:
        published: the published shape.
        ours: our shape.
    """

    published: tuple[int, ...]
    ours: tuple[int, ...]

    def into(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.ours)

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.published)


@dataclass(frozen=True)
class Deinterleave(Change):
    """Neighbouring rows become halves: rows 0, 2, 4, ... come first, then 1, 3, 5, ...

    Rotary positions turn the pairs ``(i, i + C/2)`` of a head here; a model that turns ``(2 i, 2 i + 1)`` gives the
    same attention when the rows of its queries and keys are put in this order. A network whose gate and up rows
    alternate has them one after the other in the same way.

    Args:
        block: rows of one head, whose order is its own; all rows where None.
        first: rows of a block that come before those that are turned, and stay.
        axis: the axis of the rows.
    """

    block: int | None = None
    first: int = 0
    axis: int = 0

    def into(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.axis, self._order(tensor.shape[self.axis], tensor.device))

    def back(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.axis, self._order(tensor.shape[self.axis], tensor.device).argsort())

    def _order(self, count: int, device: torch.device) -> Tensor:
        # an index on the meta device would give a shape and nothing else, which is all that is asked of it there
        block = self.block or count
        turned = torch.arange(self.first, block, device=device)
        order = torch.cat((torch.arange(self.first, device=device), turned[::2], turned[1::2]))
        return (torch.arange(0, count, block, device=device).unsqueeze(1) + order).flatten()


@dataclass(frozen=True)
class Chain(Change):
    """One change after the other.

    Args:
        steps: in the order from the published form to ours.
    """

    steps: tuple[Change, ...]

    def into(self, tensor: Tensor) -> Tensor:
        for step in self.steps:
            tensor = step.into(tensor)
        return tensor

    def back(self, tensor: Tensor) -> Tensor:
        for step in reversed(self.steps):
            tensor = step.back(tensor)
        return tensor
