"""Several codes a frame as one stream of ids, and back.

A codec of K codebooks gives K codes for each frame. Flattened, a frame is K ids in a row, each codebook with a range of
its own: id = size of all codebooks before + code. So the vocabulary is the sum of the sizes, and an id says which
codebook it is of. Delay patterns and parallel streams start from the codes ``(K, T)`` themselves, which tokenizers give
as well.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimoe.tokenizers.base import Tokenizer, TokenizerError
from omnimoe.tokenizers.waveforms import USUAL_RATE

logger = logging.getLogger(__name__)


class CodeFramesTokenizer(Tokenizer):
    """A codec whose frame is several codes; a subclass says how clips become codes ``(K, T)`` and codes clips.

    Attributes:
        codebook_sizes: K sizes, in the order of a frame.
        sample_rate: of decoded clips, in Hz.
    """

    modality = "speech"
    sample_rate: int
    codebook_sizes: tuple[int, ...]

    @property
    def frame_size(self) -> int:
        """Codes of a frame, K."""
        return len(self.codebook_sizes)

    def encode(self, raw: Any, sample_rate: int = USUAL_RATE) -> Tensor:
        """A clip to ids ``(T * K,)`` int64, frame by frame.

        Silence is a clip like any other: its frames are those of digital silence, and repeat.

        Args:
            raw: ``(n,)`` floating point in ``[-1, 1]``, or int16; one channel; an array, tensor or sequence.
            sample_rate: of ``raw`` in Hz; other rates than the codec's own are resampled.

        Raises:
            TokenizerError: if ``raw`` is empty, has several channels, is not finite or lies out of range, or the rate
                is no positive integer.
        """
        return flatten_codes(self.encode_codes(raw, sample_rate), self.codebook_sizes)

    def decode(self, ids: Any) -> np.ndarray:
        """Ids ``(n,)`` to a waveform, ``(samples,)`` float32 in ``[-1, 1]`` at :attr:`sample_rate`.

        Ids that form no whole frame are left out with a warning in the log.

        Raises:
            TokenizerError: if an id is out of range, or there is more than one axis.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes the ids of one clip, not {tuple(ids.shape)}")
        codes, left_out = read_frames(ids, self.codebook_sizes)
        if left_out:
            sizes = len(self.codebook_sizes)
            logger.warning("%d of %d ids form no frame of %d and are left out", left_out, len(ids), sizes)
        return self.decode_codes(codes)

    def encode_codes(self, raw: Any, sample_rate: int = USUAL_RATE) -> Tensor:
        """A clip to codes ``(K, T)`` int64; the end is padded with silence to a whole frame."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode_codes")

    def decode_codes(self, codes: Tensor) -> np.ndarray:
        """Codes ``(K, T)`` to a waveform ``(samples,)``, float32 in ``[-1, 1]``."""
        raise NotImplementedError(f"{type(self).__name__} does not define decode_codes")


def flatten_codes(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Codes to ids, frame by frame, the first codebook first.

    Args:
        codes: ``(K, T)`` int64, each row in ``0..size-1`` of its codebook.
        sizes: K sizes.

    Returns:
        ``(T * K,)`` int64.

    Raises:
        TokenizerError: if the shape is another, or a code is out of range.

    Example:
        >>> flatten_codes(torch.tensor([[1, 2], [0, 3]]), (4, 4)).tolist()
        [1, 4, 2, 7]
    """
    check_codes(codes, sizes)
    return (codes + _starts(sizes).unsqueeze(1)).T.flatten()


def read_frames(ids: Tensor, sizes: Sequence[int]) -> tuple[Tensor, int]:
    """Ids to codes. What does not form a frame is left out, for a model may write anything.

    A frame is K ids in a row, the k-th of the k-th codebook. The ids are read once from left to right: an id of the
    first codebook begins a frame, and one that does not continue the frame ends it.

    Args:
        ids: ``(n,)`` int64 in ``0..sum(sizes)-1``.
        sizes: K sizes.

    Returns:
        Codes ``(K, T)`` int64, and how many ids were left out.

    Example:
        >>> codes, left_out = read_frames(torch.tensor([1, 4, 2, 3, 7]), (4, 4))
        >>> codes.tolist(), left_out
        ([[1, 3], [0, 3]], 1)
    """
    starts = _starts(sizes)
    books = torch.searchsorted(starts, ids, right=True) - 1
    frames, begun = [], 0
    for place, book in enumerate(books.tolist()):
        # A first codebook always begins anew, so a frame cut short does not take the next one with it.
        begun = begun + 1 if book == begun else int(book == 0)
        if begun == len(sizes):
            frames.append(place + 1 - begun)
            begun = 0
    places = torch.tensor(frames, dtype=torch.long).unsqueeze(1) + torch.arange(len(sizes))
    codes = (ids[places] - starts).T.contiguous()
    return codes, len(ids) - codes.numel()


def check_codes(codes: Tensor, sizes: Sequence[int]) -> None:
    """Refuses codes that a decoder would misread.

    Raises:
        TokenizerError: if ``codes`` are not ``(K, T)`` integers, or one is out of range.
    """
    if codes.ndim != 2 or len(codes) != len(sizes) or codes.is_floating_point() or codes.dtype == torch.bool:
        raise TokenizerError(f"codes must be ({len(sizes)}, T) integers, not {codes.dtype} {tuple(codes.shape)}")
    limits = torch.tensor(sizes).unsqueeze(1)
    if bool(((codes < 0) | (codes >= limits)).any()):
        raise TokenizerError(f"codes must lie below {', '.join(map(str, sizes))} by codebook and not below 0")


def _starts(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)][:-1])
