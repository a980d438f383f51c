"""Static routing."""

from __future__ import annotations

import torch

from omnimoe.layers import RowLayout
from omnimoe.routers import StaticRouter


def test_the_expert_of_a_row_is_the_expert_of_its_key():
    rows = RowLayout.build(torch.tensor([[2, 0, 1, 0]]), num_keys=3, sort=False)
    x = torch.randn(4, 5)
    for chosen, wanted in (((), [2, 0, 1, 0]), ((3, 1, 3), [3, 3, 1, 3])):
        router = StaticRouter.Config(experts_of_keys=chosen).build(hidden_size=5, num_experts=4, num_modalities=3)
        routing = router(x, rows)
        assert routing.expert_ids.tolist() == wanted
        assert routing.token_index.tolist() == [0, 1, 2, 3]
        assert torch.equal(routing.expert_weights, torch.ones(4))
        assert routing.router_logits is None
