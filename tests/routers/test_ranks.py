"""Balance and bias over the batches of several processes: each rank answers as one process with all rows would."""

from __future__ import annotations

import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

from omnimoe.layers import RowLayout
from omnimoe.routers import TopKRouter, load_balance_loss


def make() -> TopKRouter:
    torch.manual_seed(0)
    config = TopKRouter.Config(
        load_balance_coef=1.0, load_balance_scope="ranks", expert_bias="shared", expert_bias_update="proportional"
    )
    router = config.build(hidden_size=4, num_experts=3, num_modalities=1)
    router.scorer.weight.data.normal_()
    return router


def rows_of(count: int) -> RowLayout:
    return RowLayout.build(torch.zeros(1, count, dtype=torch.int64), num_keys=1)


def work(rank: int, path: str, results) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
        router = make()
        x = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(1))[rank]
        routing = router(x, rows_of(10))
        loss = routing.losses["load_balance"]
        loss.backward()
        router.update(routing)
        results.put((rank, loss.item(), router.scorer.weight.grad.tolist(), router.expert_bias.tolist()))
        dist.destroy_process_group()
    except Exception:
        results.put((rank, traceback.format_exc(), [], []))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.slow
@pytest.mark.ranks
def test_load_is_counted_over_all_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=180) for _ in processes)
    for process in processes:
        process.join(30)
    assert all(isinstance(loss, float) for _, loss, _, _ in found), found
    x = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(1)).view(20, 4)
    whole = make()
    routing = whole(x, rows_of(20))
    routing.losses["load_balance"].backward()
    assert sum(loss for _, loss, _, _ in found) / 2 == pytest.approx(routing.losses["load_balance"].item())
    grads = torch.tensor([grad for _, _, grad, _ in found]).mean(0)
    torch.testing.assert_close(grads, whole.scorer.weight.grad)
    whole.update(routing)
    for _, _, _, bias in found:
        assert bias == pytest.approx(whole.expert_bias.tolist())
    probs, ids = routing.router_logits.softmax(-1), routing.expert_ids
    apart = (load_balance_loss(probs[:10], ids[:20], 2) + load_balance_loss(probs[10:], ids[20:], 2)) / 2
    assert abs(apart.item() - routing.losses["load_balance"].item()) > 1e-4
