"""Attention as an op: a plain loop, masks, the end of the keys, and which implementation runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import omnimoe
from omnimoe.ops import BackendError, attend, backend
from omnimoe.ops.attend import IMPLEMENTATIONS, KERNELS_FIRST, cpp, fused, reference

CALLS = {"cpp": cpp.attend, "torch": fused.attend, "reference": reference.attend}
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=sorted(CALLS))
def call(request):
    """Each implementation."""
    if request.param == "cpp":
        request.getfixturevalue("compiled")
    return CALLS[request.param]


def parts(batch, heads, kv_heads, queries, keys, width, value_width, dtype=torch.float64, seed=0):
    """Queries, keys and values, of which the first two are no contiguous tensors."""
    draw = torch.Generator().manual_seed(seed)

    def made(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    query = made(batch, queries, heads, width).transpose(1, 2)
    return query, made(batch, kv_heads, keys + 3, width)[:, :, 3:], made(batch, kv_heads, keys, value_width)


def drawn_mask(batch, queries, keys, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 1, queries, keys, generator=draw) < 0.4
    mask[..., -1] = True
    return mask


def plainly(query, key, value, mask, scale, is_causal):
    """A loop over sequences, heads and queries."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    out = torch.zeros(batch, queries, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            shared = h * kv_heads // heads
            for q in range(queries):
                seen = [k for k in range(keys) if not is_causal or k <= q + keys - queries]
                if mask is not None:
                    seen = [k for k in seen if mask[b % len(mask), 0, q, k]]
                scores = [math.exp(scale * float(query[b, h, q] @ key[b, shared, k])) for k in seen]
                for score, k in zip(scores, seen, strict=True):
                    out[b, q, h] += score / sum(scores) * value[b, shared, k]
    return out


@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (4, 4), (3, 7)])
def test_a_plain_loop(call, kind, queries, keys):
    query, key, value = parts(2, 4, 2, queries, keys, 3, 5)
    mask = drawn_mask(2, queries, keys) if kind == "mask" else None
    found = call(query, key, value, mask, 0.7, kind == "causal")
    torch.testing.assert_close(found, plainly(query, key, value, mask, 0.7, kind == "causal"))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
@pytest.mark.parametrize("shape", [(1, 8, 4, 50, 130, 64, 64), (2, 3, 3, 33, 33, 16, 24), (1, 2, 1, 30, 1100, 7, 33)])
def test_the_kernel_at_any_size(dtype, kind, shape):
    operands = parts(*shape, dtype)
    mask = drawn_mask(1, shape[3], shape[4]) if kind == "mask" else None
    if mask is not None:
        mask[:, :, 0, :600], mask[:, :, 0, -1] = False, True  # a whole block of keys that a query does not see
    exact = reference.attend(*(part.double() for part in operands), mask, 0.2, kind == "causal")
    found = cpp.attend(*operands, mask, 0.2, kind == "causal")
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert (found.double() - exact).norm() <= TOLERANCES[dtype] * exact.norm()


@pytest.mark.usefixtures("compiled")
@settings(max_examples=30)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    ends=st.lists(st.integers(0, 1100), min_size=1, max_size=40),
    keys=st.integers(1, 1100),
    seed=st.integers(0, 9),
)
def test_masks_that_end_anywhere(heads, ends, keys, seed):
    query, key, value = parts(1, *heads, len(ends), keys, 5, 6, torch.float32, seed)
    last = torch.tensor(ends).clamp_max(keys)
    mask = drawn_mask(1, len(ends), keys, seed) & (torch.arange(keys) < last[:, None])
    mask[0, 0, torch.arange(len(ends)), (last - 1).clamp_min(0)] = last > 0  # the last that is seen
    exact = plain_softmax(query.double(), key.double(), value.double(), mask)
    found = cpp.attend(query, key, value, mask, 1.0, False)
    assert not found[:, last == 0].any()
    assert (found.double() - exact).norm() <= 1e-5 * exact.norm() + 1e-12


def plain_softmax(query, key, value, mask):
    """The reference, with zeros for a query that sees nothing."""
    seen = mask | ~mask.any(-1, keepdim=True)
    return reference.attend(query, key, value, seen, 1.0, False) * mask.any(-1)[:, 0, :, None, None]


@pytest.mark.usefixtures("compiled")
@settings(max_examples=40)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    queries=st.integers(1, 60),
    past=st.integers(0, 70),
    width=st.integers(1, 40),
    is_causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_kernel_at_drawn_sizes(heads, queries, past, width, is_causal, seed):
    operands = parts(2, *heads, queries, queries + past, width, width + 1, torch.float32, seed)
    exact = reference.attend(*(part.double() for part in operands), None, 1.0, is_causal)
    found = cpp.attend(*operands, None, 1.0, is_causal)
    assert (found.double() - exact).norm() <= 1e-5 * exact.norm()


def slopes(call, operands, mask, scale, is_causal, grad):
    """What a call gives, and the gradients of its operands."""
    inputs = [part.detach().requires_grad_() for part in operands]
    out = call(*inputs, mask, scale, is_causal)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
@pytest.mark.parametrize("shape", [(1, 8, 4, 50, 130, 64, 64), (2, 3, 3, 33, 33, 16, 24), (1, 4, 1, 70, 300, 7, 33)])
def test_the_gradients_of_the_kernel_at_any_size(dtype, kind, shape):
    operands = parts(*shape, dtype)
    mask = drawn_mask(shape[0], shape[3], shape[4]) if kind == "mask" else None
    if mask is not None:
        mask[:, :, 0, :-1] = mask[:, :, 5:9, shape[4] // 3 :] = False  # keys that lie far apart
        mask[:, :, 5:9, 0] = True
    grad = torch.randn(shape[0], shape[3], shape[1], shape[6], generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [part.double() for part in operands]
    exact = slopes(reference.attend, wide, mask, 0.2, kind == "causal", grad)
    found = slopes(cpp.attend, operands, mask, 0.2, kind == "causal", grad)
    for part, wanted in zip(found, exact, strict=True):
        assert part.dtype == dtype
        assert (part.double() - wanted).norm() <= 2 * TOLERANCES[dtype] * wanted.norm()


@pytest.mark.usefixtures("compiled")
@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    spans=st.lists(st.tuples(st.integers(0, 420), st.integers(0, 420)), min_size=1, max_size=60),
    keys=st.integers(1, 420),
    width=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_the_gradients_of_documents_that_lie_anywhere(heads, spans, keys, width, seed):
    query, key, value = parts(1, *heads, len(spans), keys, width, width + 1, torch.float32, seed)
    first, last = torch.tensor(spans).T.sort(0).values
    place = torch.arange(keys)
    mask = ((place >= first[:, None]) & (place < last[:, None]))[None, None]
    grad = torch.randn(1, len(spans), heads[0], width + 1, generator=torch.Generator().manual_seed(seed))
    wide = [part.double() for part in (query, key, value)]
    exact = slopes(lambda *call: plain_softmax(*call[:4]), wide, mask, 1.0, False, grad.double())
    found = slopes(cpp.attend, (query, key, value), mask, 1.0, False, grad)
    for part, wanted in zip(found, exact, strict=True):
        # with one key a difference of equal numbers
        assert (part.double() - wanted).norm() <= 1e-5 * (wanted.norm() + 1)
    hidden = ~mask.any(2).squeeze()
    assert not found[2][:, :, hidden].any()
    assert not found[3][:, :, hidden].any()


@pytest.mark.usefixtures("compiled")
def test_what_is_kept_for_backward():
    query, key, value = (part.contiguous() for part in parts(2, 4, 2, 50, 60, 16, 24, torch.float32))
    kept = []

    def keep(part):
        kept.append(tuple(part.shape))
        return part

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        cpp.attend(query.requires_grad_(), key, value, None, 0.5, True)
    shapes = (query.shape, key.shape, value.shape, (2, 50, 4, 24), (2, 4, 50))
    assert sorted(kept) == sorted(tuple(shape) for shape in shapes)  # and no matrix of scores


@pytest.mark.usefixtures("compiled")
def test_the_number_of_threads_changes_no_bit():
    operands, threads = parts(1, 4, 2, 300, 700, 24, 24, torch.float32), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(slopes(cpp.attend, operands, None, 0.3, True, torch.ones(1, 300, 4, 24)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.usefixtures("compiled")
def test_large_scores_stay_finite_and_a_query_that_sees_nothing_gives_zeros():
    query, key, value = parts(1, 2, 2, 40, 50, 8, 8, torch.float32)
    found = cpp.attend(1000 * query, 1000 * key, value, None, 1.0, False)
    torch.testing.assert_close(found, reference.attend(1000 * query, 1000 * key, value, None, 1.0, False))
    mask = torch.ones(1, 1, 40, 50, dtype=torch.bool)
    mask[:, :, 7] = False
    assert not cpp.attend(query, key, value, mask, 1.0, False)[:, 7].any()
    assert torch.equal(cpp.attend(query, key[:, :, :0], value[:, :, :0], None, 1.0, False), torch.zeros(1, 40, 2, 8))


@pytest.mark.parametrize("heads", [1, 4])
def test_numbers_may_be_added_to_the_scores(heads):
    query, key, value = parts(2, 4, 2, 1, 5, 8, 8)
    added = torch.randn(2, heads, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        found = attend(query, key, value, added, scale=0.5)
    torch.testing.assert_close(found, reference.attend(query, key, value, added, 0.5, False))


@pytest.mark.usefixtures("compiled")
def test_which_implementation_runs():
    query, key, value = parts(1, 4, 2, 3, 5, 8, 8, torch.float32)
    assert torch.equal(attend(query, key, value, scale=0.5), cpp.attend(query, key, value, None, 0.5, False))
    with backend("cpp"), pytest.raises(BackendError, match="adds to the scores"):
        attend(query, key, value, torch.zeros(1, 1, 3, 5), scale=0.5)
    with backend("cpp"), pytest.raises(BackendError, match="dtypes differ"):
        attend(query, key, value.double(), scale=0.5)
    halves = [part.bfloat16() for part in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(query, key, value, scale=0.5)
        attend(query, key, value, torch.zeros(1, 1, 3, 5), scale=0.5)  # which PyTorch's takes
    assert torch.equal(mixed, cpp.attend(*halves, None, 0.5, False))
    assert [one.backend for one in IMPLEMENTATIONS] == ["torch", "cpp", "reference"]
    assert [one.backend for one in KERNELS_FIRST] == ["cpp", "torch", "reference"]


def test_gradients_of_all_implementations(compiled):
    operands = parts(1, 4, 2, 3, 5, 4, 4)
    mask, found = drawn_mask(1, 3, 5), {}
    for name in CALLS:
        inputs = [part.detach().clone().requires_grad_() for part in operands]
        with omnimoe.backend(name):
            attend(*inputs, mask, scale=0.5).square().sum().backward()
        found[name] = [part.grad for part in inputs]
    for name in ("cpp", "torch"):
        torch.testing.assert_close(found[name], found["reference"])


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = parts(1, 4, 2, 3, 5, 8, 8)
    wrong = [
        ((query, key[..., :4], value), {}, "key must be \\(1, H_kv, K, 8\\)"),
        ((query, key, value[:, :, :4]), {}, "value as long"),
        ((query[:, :3], key, value), {}, "the 3 heads of query must be a multiple of the 2"),
        ((query, key, value, torch.ones(1, 1, 3, 4, dtype=torch.bool)), {}, "mask must be \\(B, 1, 3, 5\\)"),
        ((query, key, value, drawn_mask(1, 3, 5)), {"is_causal": True}, "beside is_causal"),
    ]
    for operands, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            attend(*operands, scale=1.0, **options)


@pytest.mark.usefixtures("compiled")
def test_a_query_that_sees_nothing_has_no_gradient():
    query, key, value = parts(1, 2, 2, 6, 5, 8, 8, torch.float32)
    mask = torch.ones(1, 1, 6, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    _, of_query, *others = slopes(cpp.attend, (query, key, value), mask, 1.0, False, torch.ones(1, 6, 2, 8))
    assert not of_query[:, :, 2].any()
    assert all(part.isfinite().all() for part in (of_query, *others))
    empty = slopes(cpp.attend, (query, key[:, :, :0], value[:, :, :0]), None, 1.0, False, torch.ones(1, 6, 2, 8))
    assert [part.abs().sum() for part in empty] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nan_is_not_hidden(compiled, dtype):
    query, key, value = (part.contiguous() for part in parts(1, 2, 2, 5, 5, 16, 16, dtype))
    key[0, 0, 2, 3] = query[0, 1, 3, 0] = float("nan")
    mixed = cpp.attend(query, key, value, None, 0.25, True)
    of_head = mixed.isnan().all(-1)[0].T.tolist()
    assert of_head == [[False, False, True, True, True], [False, False, False, True, False]]
    assert torch.equal(mixed.isnan().any(-1), mixed.isnan().all(-1))
