"""Positions read off ids equal those of the layout, and decoding with them equals the full forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnimoe.data.documents import lay_out
from omnimoe.layers import Rope
from omnimoe.spans import SpanError, SpanReader, span_positions
from tests.declarations import DECLARATIONS, DENSE, MOT, PATCHES, TEXT, build

BOS, EOS, BEGIN_IMAGE, END_IMAGE = 1, 2, 3, 4
GRIDS = {"image": (2, 2)}


def three_axes(config):
    """The same model, its heads wide enough for a frequency an axis."""
    return config.replace(
        attention=config.attention.replace(num_heads=2, num_kv_heads=1, rope=Rope.Config(sections=(2, 1, 1)))
    )


SPANS = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.lists(st.integers(7, 19), min_size=1, max_size=4)),
        st.tuples(st.just("image"), st.lists(st.integers(0, 11), min_size=4, max_size=4)),
        st.tuples(st.just("speech"), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
    ),
    min_size=1,
    max_size=5,
)


@given(
    SPANS,
    st.sampled_from([None, "image", "speech"]),
    st.sampled_from([None, EOS]),
    st.integers(0, 3),
    st.integers(1, 50),
)
def test_positions_are_those_of_the_layout(spans, opened, eos, padding, cut):
    spans = [(name, np.array(ids)) for name, ids in spans]
    piece = lay_out(spans, DENSE.token_ranges, bos_id=BOS, eos_id=eos, opened=opened, grids=GRIDS)
    ids = torch.from_numpy(piece.ids)[:cut]
    batch = torch.cat((torch.zeros(padding, dtype=torch.int64), ids))[None]
    mask = torch.cat((torch.zeros(padding), torch.ones(len(ids))))[None]
    found = span_positions(DENSE, batch, GRIDS, mask)
    assert torch.equal(found[0, padding:], torch.from_numpy(piece.positions)[:cut])
    assert not found[0, :padding].any()


def test_a_continuous_picture_has_cells_too():
    latent = PATCHES.replace(begin_id=8, end_id=9, num_tokens=4)
    config = DENSE.replace(modalities=(TEXT, latent))
    ids = torch.tensor([[BOS, 12, 8, 7, 7, 7, 7, 9, 13]])
    found = span_positions(config, ids, {"latent": (2, 2)})
    assert found[0, :, 1].tolist() == [0, 1, 2, 3, 3, 4, 4, 7, 8]
    assert found[0, :, 2].tolist() == [0, 1, 2, 3, 4, 3, 4, 7, 8]


def test_the_state_before_each_position_is_the_state_of_what_came_before():
    reader = SpanReader(DENSE)
    ids = torch.tensor([[BOS, 9, BEGIN_IMAGE, 20, 21, 22, 23, END_IMAGE, 5, 33, 6, 12]])
    group, count = reader.states(ids)
    for place in range(ids.shape[1]):
        one, far = reader.state(ids[:, :place])
        assert (int(group[0, place]), int(count[0, place])) == (int(one), int(far))


@pytest.mark.parametrize("name", ["dense", "mot", "moe"])
@pytest.mark.parametrize("guidance", [None, 2.5])
@torch.no_grad()
def test_cached_decoding_in_three_axes_equals_the_full_forward(name, guidance):
    model = build(three_axes(DECLARATIONS[name]))
    prompts = [[BOS, 9, 10, BEGIN_IMAGE], [BOS, BEGIN_IMAGE, 20, 21, 22, 23, END_IMAGE, 11, BEGIN_IMAGE, 24], [BOS, 8]]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts])
    keep = {"max_new_tokens": 12, "do_sample": False, "grids": GRIDS, "guidance": guidance, "eos_token_id": None}
    keep |= {"return_dict_in_generate": True, "output_logits": True}
    made = model.generate(ids, attention_mask=mask, **keep)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **keep)
    assert torch.equal(made.sequences, uncached.sequences)
    for row, prompt in enumerate(prompts):
        whole = made.sequences[row : row + 1, length - len(prompt) :]
        positions = span_positions(model.config, whole, GRIDS)
        wanted = model(whole, position_ids=positions).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(made.logits, 1)[row], wanted, atol=2e-5, rtol=1e-4)
        if BEGIN_IMAGE in prompt:
            flat = model(whole).logits[0, len(prompt) - 1 : -1]
            assert not torch.allclose(flat, wanted, atol=1e-3)


@pytest.mark.parametrize("grids", [{"video": (2, 2)}, {"text": (2, 2)}, {"image": (2,)}, {"image": (0, 4)}])
def test_a_grid_of_nothing_is_refused(grids):
    with pytest.raises(SpanError, match=r"pass \(rows, columns\) of image, speech"):
        span_positions(MOT, torch.tensor([[BOS]]), grids)
