"""The compiled CUDA kernels on a GPU: values and gradients, graphs, and that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from omnimoe.ops import _backends, backend, combine, experts_mlp, grouped_mm, permute, route_plan
from tests.cuda import test_experts_mlp as networks
from tests.cuda import test_grouped_mm as products
from tests.cuda.test_rows import check_plan

pytestmark = pytest.mark.gpu

DTYPES = products.DTYPES
KERNELS = ("best", "sm_80")


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    """Kernels that are there, and fresh memory that holds NaN."""
    if _backends.missing_cuda_kernels():
        pytest.skip(_backends.missing_cuda_kernels())
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that the device takes, and on Hopper those for every device too."""
    if request.param != "best":
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("this device has no others")
        monkeypatch.setenv("OMNIMOE_CUDA_KERNELS", request.param)
    return request.param


def draw(*sizes: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1) -> Tensor:
    return (torch.randn(*sizes, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "depth", "columns"),
    [((5, 0, 37), 40, 24), ((300, 1, 0, 519), 256, 384), ((3, 4), 17, 9), ((64,) * 40, 128, 200)],
    ids=["small", "several tiles", "odd", "many groups"],
)
def test_products_and_gradients_of_banks(kernels, dtype, sizes, depth, columns):
    ops, offsets = torch.ops.omnimoe, products.ends(*sizes).cuda()
    for transposed in (False, True):
        x, weight, bias = (part.cuda() for part in products.operands(dtype, sizes, depth, columns, transposed))
        index = torch.randint(0, len(x), (len(x),), device="cuda")
        grad = draw(len(x), columns, dtype=dtype)
        for rows in (None, index):
            found = ops.grouped_mm(x, weight, offsets, bias, rows, transposed)
            wanted = products.product(x, weight, offsets, bias, rows, transposed)
            assert products.distance(found, wanted) <= products.BOUND[dtype]
            taken = x if rows is None else x[rows]
            found = ops.grouped_wgrad(grad, x, offsets, None, rows)
            assert products.distance(found, products.bank_gradient(grad, taken, offsets)) <= products.BOUND[dtype]


@pytest.mark.parametrize("case", networks.CASES, ids=lambda case: f"{case.activation}-{case.dtype}-{case.width}")
def test_networks(kernels, case):
    parts = [None if part is None else part.cuda() for part in case.operands()]
    token_index = case.token_index()
    token_index = None if token_index is None else token_index.cuda()
    grad = draw(len(parts[0]), case.hidden, dtype=case.dtype)
    out, _, found = networks.forward_and_backward(torch.ops.omnimoe, case, parts, token_index, grad)
    exact = [None if part is None else part.double().requires_grad_() for part in parts]
    wanted, _ = case.definition(token_index, *exact)
    gradients = torch.autograd.grad(wanted, [part for part in exact if part is not None], grad.double())
    there = [one for one, part in zip(found, exact, strict=True) if part is not None]
    for one, other in zip([out, *there], [wanted.detach(), *gradients], strict=True):
        assert networks.distance(one, other) <= networks.BOUND[case.dtype]


def layer(tokens: int = 700, hidden: int = 256, width: int = 384, experts: int = 8, top_k: int = 2):
    """A routed layer: what it is given, and the layer itself."""
    given = [draw(tokens, hidden), draw(experts, 2 * width, hidden, scale=hidden**-0.5),
             draw(experts, hidden, width, scale=width**-0.5), torch.rand(tokens, top_k, device="cuda")]  # fmt: skip
    chosen = torch.rand(tokens, experts, device="cuda").topk(top_k).indices

    def run(chosen, x, into, down, weights):
        plan = route_plan(chosen, experts)
        scale = permute(weights.reshape(-1), plan.order, plan.inverse)
        return experts_mlp(x, into, down, plan.offsets, "silu", plan.token_index, scale)

    return chosen, [part.requires_grad_() for part in given], run


def test_a_routed_layer_waits_for_nothing_and_repeats_itself(kernels):
    chosen, given, run = layer()
    found = []
    with backend("cuda"):
        run(chosen, *given).sum().backward()  # the first call asks the device for its properties
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                y = run(chosen, *given)
                found.append([y, *torch.autograd.grad(y, given, torch.ones_like(y))])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with backend("reference"):
        wanted = run(chosen, *(part.double() for part in given[:3]), given[3].double())
    assert networks.distance(found[0][0], wanted.detach()) <= 8e-3


def test_a_graph_follows_another_routing(kernels):
    chosen, given, run = layer()
    other = torch.rand(len(chosen), 8, device="cuda").topk(2).indices
    held, grad = chosen.clone(), torch.randn_like(given[0])

    def both() -> list[Tensor]:
        y = run(held, *given)
        return [y, *torch.autograd.grad(y, given, grad)]

    with backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                both()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        for routing in (other, chosen):
            held.copy_(routing)
            graph.replay()
            again = [part.clone() for part in captured]
            assert all(torch.equal(a, b) for a, b in zip(again, both(), strict=True))


def test_the_plan(kernels):
    for rows, groups in ((1, 1), (5000, 8), (70_001, 128), (40_000, 300), (3000, 100_000)):
        ids = torch.randint(-1, groups + 1, (rows,))
        check_plan(_OnDevice(), ids, groups)


class _OnDevice:
    """The plan of ids on the CPU, made on the device."""

    @staticmethod
    def route_plan(ids: Tensor, groups: int) -> tuple[Tensor, ...]:
        return tuple(part.cpu() for part in torch.ops.omnimoe.route_plan(ids.cuda(), groups))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_and_permute(dtype):
    y, index, weights = draw(900, 130, dtype=dtype), torch.randint(0, 200, (900,)).cuda(), torch.rand(900).cuda()
    with backend("cuda"):
        found = combine(y, index, weights, 200)
    wanted = torch.zeros(200, 130, dtype=torch.float64, device="cuda")
    wanted.index_add_(0, index, y.double() * weights.double().unsqueeze(1))
    assert networks.distance(found, wanted) <= (4e-3 if dtype == torch.bfloat16 else 2e-6)
    order = torch.randperm(900, device="cuda")
    with backend("cuda"):
        assert torch.equal(permute(y, order, order.argsort()), y[order])


def test_offsets_that_lie_are_clamped(kernels):
    x, weight, bias = (part.cuda() for part in products.operands(torch.bfloat16, (30, 40, 60), 64, 72, False))
    for offsets in ((30, 400, 500), (90, 2, 120), (-5, 4, -1), (0, 0, 0)):
        lying = torch.tensor(offsets, dtype=torch.int32, device="cuda")
        found = torch.ops.omnimoe.grouped_mm(x, weight, lying, bias)
        wanted = products.product(x, weight, lying, bias)
        assert products.distance(found, wanted) <= 4e-3 or not wanted.any()


def test_the_compiler_takes_them():
    chosen, given, run = layer(96, 64, 32, 4)
    with backend("cuda"):
        wanted = run(chosen, *given)
        found = torch.compile(run, fullgraph=True, dynamic=True)(chosen, *given)
    torch.testing.assert_close(found, wanted)
    offsets = torch.tensor([40, 40, 90], dtype=torch.int32, device="cuda")
    x, weight = draw(96, 64).requires_grad_(), draw(3, 32, 64).requires_grad_()
    torch.library.opcheck(torch.ops.omnimoe.grouped_mm.default, (x, weight, offsets))


def test_gradcheck_in_float64():
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32, device="cuda")
    given = [
        torch.randn(*sizes, device="cuda", dtype=torch.float64, requires_grad=True) for sizes in ((7, 3), (3, 4, 3))
    ]
    with backend("cuda"):
        assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, offsets), given)
