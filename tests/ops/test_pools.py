"""Banks in pools of unequal width: rows of each pool against that pool alone, with and without reading offsets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimoe.ops import _pools, backend, experts_mlp, grouped_mm

GROUPS = (2, 1, 2)
WIDTHS = (5, 3, 8)


@pytest.fixture(params=["reference", "torch", "cpp"])
def through(request):
    """Runs the test within one backend."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    with backend(request.param):
        yield request.param


@pytest.fixture(params=["slices", "turns"])
def way(request, monkeypatch):
    """How a pool finds its rows: as slices, or as on a device, where nothing is read back."""
    if request.param == "turns":
        monkeypatch.setattr(_pools, "reads_offsets", lambda x: False)


def ends(sizes) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def stacked(pools: list[torch.Tensor]) -> list[torch.Tensor]:
    return [matrix for pool in pools for matrix in pool]


def check_product(sizes, widths, depths, *, beyond=0, with_bias=True, gathered=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = [len(sizes) // len(widths)] * (len(widths) - 1)
    groups.append(len(sizes) - sum(groups))
    pools = [
        normal(count, width, depth, seed=n)
        for n, (count, width, depth) in enumerate(zip(groups, widths, depths, strict=True))
    ]
    bias = [normal(count, width, seed=n) for n, (count, width) in enumerate(zip(groups, widths, strict=True))]
    bias = bias if with_bias else None
    rows = sum(sizes) + beyond
    x = normal(6 if gathered else rows, max(depths), seed=9)
    index = torch.randint(0, 6, (rows,), generator=generator) if gathered else None
    y = grouped_mm(x, pools, ends(sizes), bias, index)
    wanted, row = torch.zeros(rows, max(widths), dtype=torch.float64), 0
    shifts = None if bias is None else stacked(bias)
    for group, (size, matrix) in enumerate(zip(sizes, stacked(pools), strict=True)):
        for _ in range(size):
            given_ = x[row if index is None else index[row]][: matrix.shape[1]]
            line = matrix @ given_ + (0 if shifts is None else shifts[group])
            wanted = wanted.index_put((torch.tensor(row), torch.arange(len(line))), line)
            row += 1
    torch.testing.assert_close(y, wanted)
    given_ = [x, *pools, *(bias or [])]
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    for found, right in zip(
        torch.autograd.grad(y, given_, grad),
        torch.autograd.grad(wanted, given_, grad, allow_unused=True, materialize_grads=True)
        if wanted.requires_grad
        else [torch.zeros_like(part) for part in given_],
        strict=True,
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("sizes", [(3, 0, 4, 2, 1), (0, 0, 0, 0, 0), (0, 0, 6, 0, 0)], ids=str)
@pytest.mark.parametrize("gathered", [True, False])
def test_each_pool_multiplies_its_own_rows(through, way, sizes, gathered):
    check_product(sizes, WIDTHS, (4, 7, 6), beyond=2, gathered=gathered)


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=3, max_size=7),
    widths=st.tuples(*[st.integers(1, 40)] * 3),
    depths=st.tuples(*[st.integers(1, 40)] * 3),
    beyond=st.integers(0, 2),
    with_bias=st.booleans(),
    gathered=st.booleans(),
)
def test_products_at_drawn_sizes(compiled, sizes, widths, depths, **more):
    with backend("cpp"):
        check_product(sizes, widths, depths, **more)


def network(sizes, routed, **options):
    """Operands of three pools, and their result as one call a group."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(sizes) + 2
    into = [normal(count, 2 * width, 4, seed=n) for n, (count, width) in enumerate(zip(GROUPS, WIDTHS, strict=True))]
    down = [normal(count, 4, width, seed=3 + n) for n, (count, width) in enumerate(zip(GROUPS, WIDTHS, strict=True))]
    biases = [[normal(*bank.shape[:2], seed=6 + n) for n, bank in enumerate(banks)] for banks in (into, down)]
    x = normal(6 if routed else rows, 4, seed=20)
    token_index = torch.randint(0, 6, (rows,), generator=generator) if routed else None
    weights = torch.rand(rows, generator=generator, dtype=torch.float64).requires_grad_()
    names = {"gate_up_bias": biases[0], "down_bias": biases[1]}
    y = experts_mlp(x, into, down, ends(sizes), "silu", token_index, weights, **names, **options)
    wanted, start = torch.zeros_like(y), 0
    for group, size in enumerate(sizes):
        run = slice(start, start + size)
        one = [stacked(part)[group][None] for part in (into, down, *biases)]
        tokens = torch.arange(rows)[run] if token_index is None else token_index[run]
        named = {"gate_up_bias": one[2], "down_bias": one[3]}
        part = experts_mlp(x[tokens], *one[:2], ends((size,)), "silu", None, weights[run], **named, **options)
        wanted = wanted.index_add(0, tokens, part)
        start += size
    return y, wanted, [x, weights, *into, *down, *biases[0], *biases[1]]


@pytest.mark.parametrize("sizes", [(3, 0, 4, 2, 1), (0, 0, 6, 0, 0), (0, 0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("options", [{}, {"interleaved": True, "save": "none"}], ids=str)
def test_a_network_in_pools_is_that_of_its_groups(through, way, sizes, routed, options):
    y, wanted, given_ = network(sizes, routed, **options)
    torch.testing.assert_close(y, wanted)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, right = (torch.autograd.grad(value, given_, grad, allow_unused=True) for value in (y, wanted))
    for one, other in zip(found, right, strict=True):
        assert one is not None
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_pools_compile_into_one_graph_of_any_size(compiled):
    torch._dynamo.reset()
    into = [torch.randn(count, 2 * width, 4) for count, width in zip(GROUPS, WIDTHS, strict=True)]
    down = [torch.randn(count, 4, width) for count, width in zip(GROUPS, WIDTHS, strict=True)]
    call = torch.compile(
        lambda x, ends_, index: experts_mlp(x, into, down, ends_, "silu", index) * 2, fullgraph=True, dynamic=True
    )
    for sizes in ((3, 0, 4, 2, 1), (1, 5, 2, 0, 9)):
        x, index = torch.randn(8, 4), torch.randint(0, 8, (sum(sizes),))
        torch.testing.assert_close(
            call(x, ends(sizes), index), experts_mlp(x, into, down, ends(sizes), "silu", index) * 2
        )


def test_bad_pools_are_refused():
    pools, x = [torch.randn(2, 5, 4), torch.randn(1, 3, 4)], torch.randn(6, 4)
    with pytest.raises(ValueError, match="offsets must be \\(3,\\) int32 for all pools, got \\(2,\\)"):
        grouped_mm(x, pools, ends((2, 4)))
    with pytest.raises(ValueError, match="x must be \\(R, 4\\), as deep as the deepest pool, got \\(6, 3\\)"):
        grouped_mm(x[:, :3], pools, ends((2, 2, 2)))
    with pytest.raises(ValueError, match="pools take a bias each"):
        grouped_mm(x, pools, ends((2, 2, 2)), torch.randn(3, 5))
    with pytest.raises(ValueError, match="a bias for each of the 2 pools, got 1"):
        grouped_mm(x, pools, ends((2, 2, 2)), [torch.randn(2, 5)])
    with pytest.raises(ValueError, match="offsets must not decrease nor pass the 6 rows"):
        grouped_mm(x, pools, ends((2, 2, 3)))
    with pytest.raises(ValueError, match="must be lists of as many"):
        experts_mlp(x, pools, torch.randn(3, 4, 5), ends((2, 2, 2)))
    with pytest.raises(ValueError, match=r"pools must be \(G_p, F_p, D_p\) each, got \[\]"):
        grouped_mm(x, [], ends(()))
