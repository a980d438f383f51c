"""An opponent for a picture decoder: a network that learns to tell patches of real pictures from decoded ones.

A loss on pixels is least where what is uncertain is blurred. The opponent does not mind which of two sharp edges the
decoder draws, but it finds the blur.

Source: patches, https://arxiv.org/abs/1611.07004; the hinge, and the weight by the size of gradients, VQGAN,
https://arxiv.org/abs/2012.09841; the bounded layers, https://arxiv.org/abs/1802.05957.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WARMUP = 100
"""Steps in which the opponent learns and the decoder is not told."""


class PatchJudge(nn.Module):
    """``(B, 3, S, S)`` in [-1, 1] to a score ``(B, 1, s, s)`` for each patch of 22 pixels, high for what looks real.

    Args:
        channels: width of the first layer; each of the next two doubles it.
    """

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1))
            for before, after in itertools.pairwise(widths)
        )
        self.score = spectral_norm(nn.Conv2d(widths[-1], 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.score(x)


class Opponent:
    """The judge, its optimizer, and what the decoder is told.

    Args:
        last: the decoder's last weight, by whose gradients the two losses are weighed.
        weight: size of the judge's gradient there, as a part of that of the reconstruction.
        rate: of the judge's Adam.
    """

    def __init__(self, last: nn.Parameter, weight: float, *, rate: float = 4e-4) -> None:
        self.last, self.weight = last, weight
        self.judge = PatchJudge().to(last.device)
        self.optimizer = torch.optim.Adam(self.judge.parameters(), rate, betas=(0.5, 0.9))
        self.steps = 0

    def learn(self, made: Tensor, real: Tensor) -> float:
        """A step of the judge: real patches above 1, decoded ones below -1. Returns its loss, 0 where it is sure."""
        self.judge.requires_grad_(True)
        loss = F.relu(1 - self.judge(real)).mean() + F.relu(1 + self.judge(made.detach())).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.judge.requires_grad_(False)
        self.steps += 1
        return loss.item()

    def loss(self, made: Tensor, real: Tensor, reconstruction: Tensor) -> Tensor:
        """What is added to the decoder's loss, after a step of the judge.

        Args:
            made: ``(B, 3, S, S)``, decoded, with a graph.
            real: the same pictures.
            reconstruction: the loss that it is weighed against, with a graph.
        """
        self.learn(made.float(), real)
        if self.steps <= WARMUP:
            return reconstruction.new_zeros(())
        fooled = -self.judge(made.float()).mean()
        (own,) = torch.autograd.grad(reconstruction, self.last, retain_graph=True)
        (told,) = torch.autograd.grad(fooled, self.last, retain_graph=True)
        return self.weight * (own.norm() / (told.norm() + 1e-6)).clamp(max=1e4) * fooled


__all__ = ["Opponent", "PatchJudge"]
