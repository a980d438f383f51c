"""Balance, bias and experts' choice over the batches of several processes: each rank answers as one process with all
rows would."""

from __future__ import annotations

import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

from omnimoe.layers import RowLayout
from omnimoe.routers import ByModalityRouter, DepthRouter, ExpertChoiceRouter, TopKRouter, load_balance_loss


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


def choosers():
    """Experts and a layer that choose among the rows of all ranks."""
    torch.manual_seed(0)
    inside = ExpertChoiceRouter.Config(pool="ranks")
    experts = ByModalityRouter.Config(experts=(2, 3), router=inside)
    built = experts.build(hidden_size=4, num_experts=5, num_modalities=2)
    depth = DepthRouter.Config(pool="ranks", capacity=0.4).build(hidden_size=4)
    for module in (*built.routers, depth):
        module.scorer.weight.data.normal_()
    return built, depth


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two ranks, and their keys, of which the ranks hold different numbers."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 10, 4, generator=generator), torch.tensor([[0] * 7 + [1] * 3, [0] * 2 + [1] * 8])


def chosen(x: torch.Tensor, keys: torch.Tensor) -> tuple[list, list, list]:
    """Weights of each row at each expert, the cut-offs, and the weight of each row in the layer."""
    experts, depth = choosers()
    rows = RowLayout.build(keys, num_keys=2)
    flat = rows.to_rows(x.view(*keys.shape, 4))
    routing = experts(flat, rows)
    weights = torch.zeros(len(flat), 5).index_put((routing.token_index, routing.expert_ids), routing.expert_weights)
    index, kept = depth(flat, rows)
    layer = torch.zeros(len(flat), 1).index_put((index,), kept.unsqueeze(1))
    table = rows.to_time(torch.cat((weights, layer), 1)).flatten(0, 1)
    return table[:, :5].tolist(), routing.cutoff.tolist(), table[:, 5].tolist()


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
        held, keys = drawn()
        choice = chosen(held[rank], keys[rank : rank + 1])
        results.put((rank, loss.item(), router.scorer.weight.grad.tolist(), router.expert_bias.tolist(), choice))
        dist.destroy_process_group()
    except Exception:
        results.put((rank, traceback.format_exc(), [], [], ()))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.slow
@pytest.mark.ranks
def test_load_is_counted_and_experts_choose_over_all_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=180) for _ in processes)
    for process in processes:
        process.join(30)
    assert all(isinstance(loss, float) for _, loss, *_ in found), found
    x = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(1)).view(20, 4)
    whole = make()
    routing = whole(x, rows_of(20))
    routing.losses["load_balance"].backward()
    assert sum(loss for _, loss, *_ in found) / 2 == pytest.approx(routing.losses["load_balance"].item())
    grads = torch.tensor([grad for _, _, grad, *_ in found]).mean(0)
    torch.testing.assert_close(grads, whole.scorer.weight.grad)
    whole.update(routing)
    for _, _, _, bias, _ in found:
        assert bias == pytest.approx(whole.expert_bias.tolist())
    probs, ids = routing.router_logits.softmax(-1), routing.expert_ids
    apart = (load_balance_loss(probs[:10], ids[:20], 2) + load_balance_loss(probs[10:], ids[20:], 2)) / 2
    assert abs(apart.item() - routing.losses["load_balance"].item()) > 1e-4
    held, keys = drawn()
    wanted = chosen(held.view(20, 4), keys)
    own = [chosen(held[rank], keys[rank : rank + 1]) for rank in range(2)]
    for part in (0, 2):
        everywhere = torch.tensor([*found[0][4][part], *found[1][4][part]])
        torch.testing.assert_close(everywhere, torch.tensor(wanted[part]))
        alone = torch.tensor([*own[0][part], *own[1][part]])
        assert not torch.equal(alone > 0, everywhere > 0), "a rank by itself chooses otherwise"
    for rank in range(2):
        torch.testing.assert_close(torch.tensor(found[rank][4][1]), torch.tensor(wanted[1]))
