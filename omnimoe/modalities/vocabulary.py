"""One vocabulary, partitioned: every discrete modality owns a range of rows of one embedding table and one head.

The partition answers three questions that would otherwise need extra inputs: which modality an id belongs to, which
rows may be generated next, and how a tokenizer's own ids become rows of the table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """The rows of the vocabulary that one discrete modality owns.

    Args:
        name: the modality.
        start: first row.
        size: number of rows; the modality's own id ``i`` is row ``start + i``.
        begin_id: row of the boundary token that opens a span, or None for the base modality (text), which needs none.
        end_id: row of the boundary token that closes a span, or None.
        num_tokens: length of every span if it is fixed (a picture of 64 tokens), else None.
        frame_size: a span of free length is a whole number of frames of so many tokens.
    """

    name: str
    start: int
    size: int
    begin_id: int | None = None
    end_id: int | None = None
    num_tokens: int | None = None
    frame_size: int = 1

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.size
