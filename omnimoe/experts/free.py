"""Experts that compute next to nothing, for routers that let a token take fewer of the others.

They stand behind the experts of the bank, in this order: those that give zero, those that give back what came in, and
those that mix what came in with a learned vector. Nothing is gathered for them: their weights make one sum a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimoe.routers import Routing

FREE_EXPERTS = ("zero", "identity", "constant")


class FreeExperts(nn.Module):
    """The sum of the free experts of every row.

    A constant expert gives ``a * x + b * v`` with ``(a, b) = softmax(W x)`` and v learned.

    Args:
        hidden_size: D.
        kinds: of each free expert, a name of :data:`FREE_EXPERTS`.

    Source: MoE++, https://arxiv.org/abs/2410.07348; identity experts also LongCat-Flash,
    https://arxiv.org/abs/2509.01322; zero experts as null experts Uni-MoE-2.0, https://arxiv.org/abs/2511.12609.
    """

    initial = {"mix": "normal", "vectors": "normal"}

    def __init__(self, hidden_size: int, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds
        constants = kinds.count("constant")
        self.mix = nn.Parameter(torch.empty(constants, 2, hidden_size)) if constants else None
        self.vectors = nn.Parameter(torch.empty(constants, hidden_size)) if constants else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor, routing: Routing, first: int) -> Tensor:
        """``(N, D)`` rows to ``(N, D)``.

        Args:
            x: ``(N, D)``.
            routing: of the rows.
            first: id of the first free expert.
        """
        count = len(self.kinds)
        number = routing.expert_ids - first
        is_free = (number >= 0) & (number < count)
        cells = routing.token_index * count + number.clamp(0, count - 1)
        given = torch.where(is_free, routing.expert_weights, 0)
        weights = given.new_zeros(len(x) * count).index_add(0, cells, given).view(len(x), count)
        zeros, identities = self.kinds.count("zero"), self.kinds.count("identity")
        scale = weights[:, zeros : zeros + identities].sum(-1, keepdim=True)
        if self.mix is None or self.vectors is None:
            return x * scale
        constant = weights[:, zeros + identities :]
        mixed = torch.einsum("nd,ctd->nct", x, self.mix.to(x.dtype)).float().softmax(-1).to(x.dtype)
        scale = scale + (constant * mixed[..., 0]).sum(-1, keepdim=True)
        return x * scale + F.linear(constant * mixed[..., 1], self.vectors.t().to(x.dtype))
