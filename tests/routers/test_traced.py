"""Every router in a traced graph, where padding stays and shapes depend on no value: what it is outside of one."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.declarations import build, ids_like
from tests.routers.test_models import EXPERTS, config_of

QUICK = ("batch priority",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPERTS]
)
def test_a_training_step_is_one_graph_and_the_same(name):
    torch._dynamo.reset()
    config = config_of(name)
    whole, traced = build(config).train(), build(config).train()
    ids = ids_like(config)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    counter = CompileCounter()
    found = torch.compile(traced, fullgraph=True, backend=counter)(ids, labels=ids, attention_mask=mask)
    wanted = whole(ids, labels=ids, attention_mask=mask)
    assert counter.frame_count == 1
    torch.testing.assert_close(found.loss, wanted.loss)
    found.loss.backward()
    wanted.loss.backward()
    for (key, one), other in zip(whole.named_parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-3, msg=key)
    whole.update_routers(wanted.routings)
    traced.update_routers(found.routings)
    for (key, one), other in zip(whole.named_buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(other, one, msg=key)
