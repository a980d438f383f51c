"""A batch may lack any modality: nothing becomes NaN, and every parameter takes part."""

from __future__ import annotations

from functools import cache
from itertools import chain, combinations

import pytest
import torch

from tests.declarations import DECLARATIONS, build
from tests.refusals import unchanged

MODALITIES = ("text", "image", "speech")
SUBSETS = list(chain.from_iterable(combinations(MODALITIES, size) for size in (1, 2, 3)))


@cache
def model(name: str):
    return build(DECLARATIONS[name]).train()


@pytest.mark.hazard(17)
@pytest.mark.parametrize("present", SUBSETS, ids="+".join)
@pytest.mark.parametrize("name", ["dense", "mot", "moma", "moe"])
def test_every_gradient_is_there_and_finite_whatever_a_batch_holds(name, present):
    held = model(name)
    held.zero_grad(set_to_none=True)
    ranges = [held.config.token_ranges[modality] for modality in present]
    columns = [torch.arange(part.start, part.start + 6) for part in ranges]
    ids = torch.stack((torch.cat(columns), torch.cat(columns[::-1])))
    with unchanged(held.state_dict(), ids):
        out = held(ids, labels=ids)
        out.loss.backward()
    assert out.logits.isfinite().all()
    assert out.loss.isfinite()
    assert {name for name, count in out.counts.items() if count} == set(present)
    # collectives of gradients have the same number and shapes in every process, whatever its batch holds
    for key, parameter in held.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all(), key
