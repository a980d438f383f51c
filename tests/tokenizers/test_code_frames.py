from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnimoe.tokenizers import TokenizerError
from omnimoe.tokenizers.code_frames import flatten_codes, read_frames

SIZES = (4, 3, 5)


@given(st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), max_size=20))
def test_whole_frames_come_back(frames):
    codes = torch.tensor(frames, dtype=torch.long).reshape(-1, 3).T
    ids = flatten_codes(codes, SIZES)
    assert len(ids) == 3 * len(frames)
    again, left_out = read_frames(ids, SIZES)
    assert torch.equal(again, codes)
    assert left_out == 0


@given(st.lists(st.integers(0, sum(SIZES) - 1), max_size=60))
def test_anything_is_read_and_what_is_read_was_there(ids):
    ids = torch.tensor(ids, dtype=torch.long)
    codes, left_out = read_frames(ids, SIZES)
    kept = flatten_codes(codes, SIZES).tolist()
    assert len(kept) + left_out == len(ids)
    rest = iter(ids.tolist())
    assert all(any(id_ == other for other in rest) for id_ in kept)


@pytest.mark.parametrize(
    ("ids", "frames", "left_out"),
    [
        ([0, 4, 7, 1, 5], [[0, 0, 0]], 2),
        ([0, 4, 1, 5, 8], [[1, 1, 1]], 2),
        ([4, 7, 0, 4, 7], [[0, 0, 0]], 2),
        ([0, 7, 4, 7], [], 4),
        ([0, 4, 7, 7, 1, 4, 8], [[0, 0, 0], [1, 0, 1]], 1),
        ([], [], 0),
    ],
)
def test_broken_frames_are_left_out(ids, frames, left_out):
    codes, number = read_frames(torch.tensor(ids, dtype=torch.long), SIZES)
    assert codes.T.tolist() == frames
    assert number == left_out


@pytest.mark.parametrize(
    "codes",
    [torch.zeros(2, 4).long(), torch.zeros(3, 4), torch.zeros(3).long(), torch.full((3, 1), 3), torch.full((3, 1), -1)],
)
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(TokenizerError, match="codes must"):
        flatten_codes(codes, SIZES)
