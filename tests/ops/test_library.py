"""Every compiled op: a table of samples, and what must hold for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from omnimoe.ops import _library
from omnimoe.ops.combine import reference as summed
from omnimoe.ops.experts_mlp.activations import CODES
from omnimoe.ops.permute import reference as taken
from omnimoe.ops.route_plan import reference as sorted_rows

OPS = torch.ops.omnimoe
GROUPS = 3


@dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    Args:
        op: the name of the op.
        kind: what is special about the call.
        arguments: from the number of tokens, the number of routed rows and a dtype.
    """

    op: str
    kind: str
    arguments: Callable[[int, int, torch.dtype], tuple[Any, ...]]


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def ends(rows: int) -> torch.Tensor:
    """Three groups, one of them empty, and a row past the end where there are enough."""
    return torch.tensor([rows // 2, rows // 2, max(rows - 1, rows // 2)], dtype=torch.int32)


def index(tokens: int, rows: int) -> torch.Tensor:
    return torch.randint(0, tokens, (rows,), generator=torch.Generator().manual_seed(0))


def _network(gated: bool, plain: bool, keep: bool) -> Callable[..., tuple[Any, ...]]:
    def arguments(tokens: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
        wide = 10 if gated else 5
        wider = torch.promote_types(dtype, torch.float32)
        more = [None] * 4
        if not plain:
            weights = torch.rand(rows, dtype=wider).requires_grad_()
            biases = normal(GROUPS, wide, dtype=dtype), normal(GROUPS, 4, dtype=dtype)
            more = [index(tokens, rows), weights, *biases]
        x, into, down = (normal(*shape, dtype=dtype) for shape in ((tokens, 4), (GROUPS, wide, 4), (GROUPS, 4, 5)))
        return x, into, down, ends(tokens if plain else rows), *more, CODES["silu"], gated and not plain, keep

    return arguments


def _network_backward(gated: bool, plain: bool) -> Callable[..., tuple[Any, ...]]:
    def arguments(tokens: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
        given_ = [
            part.detach() if isinstance(part, torch.Tensor) else part
            for part in _network(gated, plain, True)(tokens, rows, dtype)
        ]
        _, z = OPS.experts_mlp(*given_)
        return torch.randn(tokens, 4, dtype=dtype), given_[0], z, *given_[1:-1]

    return arguments


def scale(groups: int, dtype: torch.dtype, width: int = 4) -> torch.Tensor:
    return torch.rand(groups, width, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()


def _norm_backward(tokens: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight = torch.randn(rows, 4, dtype=dtype), scale(GROUPS, dtype).detach()
    _, inverse = OPS.rms_norm(x, weight, ends(rows), 1e-5)
    return torch.randn(rows, 4, dtype=dtype), x, weight, inverse, ends(rows)


def _attend_backward(tokens: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    shapes = (2, 4, tokens, 3), (2, 2, rows, 3), (2, 2, rows, 5)
    operands = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    mask = torch.arange(tokens * rows).view(1, 1, tokens, rows) % 3 < 2
    out, log_sums = OPS.attend(*operands, mask, 0.5, False, True)
    return torch.randn_like(out), *operands, out, log_sums, mask, 0.5, False


def _scan(has_state: bool) -> Callable[..., tuple[Any, ...]]:
    def arguments(tokens: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        x, into, out = (normal(2, tokens, width, dtype=wide) for width in (5, 3, 3))
        step, rate = (torch.rand(*shape, dtype=wide).requires_grad_() for shape in (x.shape, (5, 3)))
        before = (normal(2, 5, 3, dtype=wide), torch.arange(2 * tokens).view(2, tokens) % 3 == 1)
        return x, step, rate, into, out, *(before if has_state else (None, None))

    return arguments


def _scan_backward(tokens: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    *operands, _, starts = [part.detach() for part in _scan(True)(tokens, rows, dtype)]
    y, last, kept = OPS.selective_scan(*operands, None, starts)
    return torch.randn_like(y), torch.randn_like(last), *operands, starts, kept


SAMPLES = [
    Sample("grouped_mm", "plain", lambda t, r, d: (normal(t, 4, dtype=d), normal(GROUPS, 5, 4, dtype=d), ends(t))),
    Sample(
        "grouped_mm",
        "gathered, transposed and with a bias",
        lambda t, r, d: (
            normal(t, 4, dtype=d), normal(GROUPS, 4, 5, dtype=d), ends(r), normal(GROUPS, 5, dtype=d), index(t, r),
            True,
        ),
    ),
    Sample("grouped_wgrad", "plain", lambda t, r, d: (normal(t, 5, dtype=d), normal(t, 4, dtype=d), ends(t))),
    Sample(
        "grouped_wgrad",
        "gathered",
        lambda t, r, d: (normal(t, 5, dtype=d), normal(t, 4, dtype=d), ends(r), index(t, r), index(t, r).flip(0)),
    ),
    Sample("route_plan", "with sentinels", lambda t, r, d: (index(GROUPS + 2, r) - 1, GROUPS)),
    Sample("gather_rows", "plain", lambda t, r, d: (normal(t, 2, 3, dtype=d), index(t, r), None)),
    Sample("gather_rows", "filled", lambda t, r, d: (normal(t, 4, dtype=d), index(t, r), torch.arange(r) % 2 == 0)),
    Sample("sum_rows", "plain", lambda t, r, d: (normal(r, 4, dtype=d), ends(r), torch.randperm(r), None)),
    Sample(
        "sum_rows",
        "weighted",
        lambda t, r, d: (
            normal(r, 4, dtype=d), ends(r), torch.randperm(r),
            torch.rand(r, dtype=torch.promote_types(d, torch.float32)).requires_grad_(),
        ),
    ),
    Sample("experts_mlp", "plain", _network(gated=True, plain=True, keep=True)),
    Sample("experts_mlp", "routed, interleaved and with biases", _network(gated=True, plain=False, keep=True)),
    Sample("experts_mlp", "that keeps nothing, without a gate", _network(gated=False, plain=False, keep=False)),
    Sample("experts_mlp_backward", "plain", _network_backward(gated=True, plain=True)),
    Sample("experts_mlp_backward", "routed", _network_backward(gated=True, plain=False)),
    Sample("rms_norm", "plain", lambda t, r, d: (normal(t, 4, dtype=d), scale(1, d), None, 1e-5)),
    Sample("rms_norm", "grouped", lambda t, r, d: (normal(r, 2, 4, dtype=d), scale(GROUPS, d), ends(r), 1e-5)),
    Sample("rms_norm_backward", "grouped", _norm_backward),
    Sample(
        "attend",
        "masked",
        lambda t, r, d: (
            normal(2, 4, t, 3, dtype=d), normal(2, 2, r, 3, dtype=d), normal(2, 2, r, 5, dtype=d),
            torch.arange(t * r).view(1, 1, t, r) % 3 < 2, 0.5, False, True,
        ),
    ),
    Sample(
        "attend",
        "causal",
        lambda t, r, d: (
            normal(1, 2, t, 3, dtype=d), *(normal(1, 1, t + 2, 3, dtype=d) for _ in "kv"), None, 0.5, True, True,
        ),
    ),
    Sample(
        "attend",
        "that keeps nothing",
        lambda t, r, d: (*(normal(1, 1, t, 3, dtype=d).detach() for _ in "qkv"), None, 0.5, True, False),
    ),
    Sample("attend_backward", "masked", _attend_backward),
    Sample("selective_scan", "plain", _scan(has_state=False)),
    Sample("selective_scan", "with a state and starts", _scan(has_state=True)),
    Sample("selective_scan_backward", "with starts", _scan_backward),
    Sample("rope", "plain", lambda t, r, d: (normal(t, 2, 6, dtype=d), *scale(2 * t, d, 3).detach().split(t))),
]  # fmt: skip

samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.op}, {sample.kind}")
pytestmark = pytest.mark.usefixtures("compiled")


def test_every_op_has_a_sample():
    schemas = (*_library.SCHEMAS, *_library.CPU_SCHEMAS)
    assert {schema.partition("(")[0] for schema in schemas} == {sample.op for sample in SAMPLES}


@samples
def test_opcheck(sample):
    opcheck(getattr(OPS, sample.op).default, sample.arguments(5, 7, torch.float32))


def floating(outputs: Any) -> list[torch.Tensor]:
    parts = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [part for part in parts if part.requires_grad]


@samples
@pytest.mark.parametrize("sizes", [(4, 5), (1, 1)], ids=str)
def test_gradcheck(sample, sizes):
    arguments = sample.arguments(*sizes, torch.float64)
    inputs = [part for part in arguments if isinstance(part, torch.Tensor) and part.requires_grad]
    if not inputs:
        pytest.skip("nothing of it has a gradient")

    def call(*given_: torch.Tensor) -> Any:
        rest = iter(given_)
        filled = (next(rest) if isinstance(part, torch.Tensor) and part.requires_grad else part for part in arguments)
        return tuple(floating(getattr(OPS, sample.op)(*filled)))

    assert torch.autograd.gradcheck(call, inputs)
    if sample.op in ("grouped_mm", "grouped_wgrad"):
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("sample", {sample.op: sample for sample in SAMPLES}.values(), ids=lambda sample: sample.op)
def test_it_compiles_into_one_graph_of_any_size(sample):
    torch._dynamo.reset()
    op = getattr(OPS, sample.op)
    call = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((5, 7), (8, 3)):
        arguments = sample.arguments(*sizes, torch.float32)
        torch.testing.assert_close(call(*arguments), op(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 12),
    ids=st.lists(st.integers(0, 14), max_size=40),
    width=st.integers(1, 200),
    seed=st.integers(0, 9),
)
def test_sums_and_gathers_at_drawn_sizes(dtype, tokens, ids, width, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(ids, dtype=torch.int64)
    plan = OPS.route_plan(ids, tokens)
    for found, wanted in zip(plan, sorted_rows.route_plan(ids, tokens), strict=True):
        assert torch.equal(found, wanted)
    y = torch.randn(len(ids), width, generator=generator).to(dtype)
    weights = torch.rand(len(ids), generator=generator).to(torch.promote_types(dtype, torch.float32))
    found, inside = OPS.sum_rows(y, *plan[:2], weights), ids < tokens
    wanted = summed.combine(y.double()[inside], ids[inside], weights.double()[inside], tokens)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
    # a float64 sum that is rounded once, but for ties and a last bit of float32
    assert (found.double() - wanted.to(dtype).double()).norm() <= tolerance / 4 * wanted.norm() + 1e-30
    filled = torch.rand(len(ids), generator=generator) < 0.5
    rows = torch.where(inside, ids, 0)
    assert torch.equal(OPS.gather_rows(found, rows, filled), taken.take(found, rows, filled))
    assert torch.equal(OPS.gather_rows(found, rows, None), found[rows])


def test_any_dtype_and_shape_of_rows_is_copied():
    rows = torch.tensor([2, 0, 2])
    for x in (
        torch.arange(12).view(3, 2, 2),
        torch.tensor([True, False, True]),
        torch.randn(4, 3).t().to(torch.complex64),
    ):
        assert torch.equal(OPS.gather_rows(x, rows, None), x[rows])
    assert torch.equal(OPS.gather_rows(torch.ones(0, 2), rows, rows > 5), torch.zeros(3, 2))


def test_nothing_is_read_outside_of_the_operands():
    x, order, offsets = torch.randn(4, 3), torch.arange(4), torch.tensor([2, 4], dtype=torch.int32)
    heads = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3)
    y, sums = OPS.attend(*heads, None, 1.0, True, True)
    scan = _scan(has_state=False)(4, 0, torch.float32)[:5]
    wrong = [
        (OPS.gather_rows, (x, torch.tensor([0, 4]), None), "index 4 is not within the 4 rows"),
        (OPS.gather_rows, (x, torch.tensor([0, -1]), None), "index -1 is not within the 4 rows"),
        (OPS.gather_rows, (x, order, torch.ones(3, dtype=torch.bool)), "filled must be"),
        (OPS.sum_rows, (x, offsets + 1, order, None), "offsets must not decrease nor pass the 4 rows"),
        (OPS.sum_rows, (x, offsets, order + 1, None), "index 4 is not within the 4 rows"),
        (OPS.sum_rows, (x, offsets, order[:3], None), "order must be"),
        (OPS.sum_rows, (x, offsets, order, torch.rand(3)), "weights must be"),
        (OPS.route_plan, (order.int(), 3), "int64"),
        (OPS.grouped_mm, (x, torch.randn(2, 5, 3), offsets, torch.randn(2, 4)), "bias must be"),
        (OPS.grouped_mm, (x, torch.randn(2, 5, 3), offsets, None, order + 1), "is not within the 4 rows"),
        (OPS.attend, (*heads, torch.ones(1, 1, 4, 3, dtype=torch.bool), 1.0, False, True), "mask must be"),
        (OPS.attend, (*heads[:2], heads[2][:, :, :3], None, 1.0, False, True), "key must be"),
        (OPS.attend_backward, (y[:, :3], *heads, y, sums, None, 1.0, True), "grad must be"),
        (OPS.attend_backward, (y, *heads, y, sums[:, :, :3], None, 1.0, True), "log_sums must be"),
        (OPS.selective_scan, (*scan[:4], scan[4][:, :3], None, None), "out has not the shape"),
        (OPS.selective_scan, (*scan, scan[2], None), "state has not the shape"),
        (OPS.selective_scan, (*scan, None, torch.ones(2, 3, dtype=torch.bool)), "starts must be"),
        (OPS.selective_scan, (scan[0].half(), *scan[1:], None, None), "x must be float32 or float64"),
    ]
    for op, arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
