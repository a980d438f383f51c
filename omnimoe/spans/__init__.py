"""Spans: what may follow in a document, how it is sampled and guided, where its cells lie, and how it comes apart."""

from __future__ import annotations

from omnimoe.spans.choices import SpanChoices
from omnimoe.spans.grammar import SpanProcessor
from omnimoe.spans.guidance import GuidanceProcessor, span_processors
from omnimoe.spans.partition import (
    SpanError,
    SpanReader,
    bounded_ranges,
    has_spans,
    owned_rows,
    position_axes,
    span_positions,
)
from omnimoe.spans.reading import Span, read_spans

__all__ = [
    "GuidanceProcessor",
    "Span",
    "SpanChoices",
    "SpanError",
    "SpanProcessor",
    "SpanReader",
    "bounded_ranges",
    "has_spans",
    "owned_rows",
    "position_axes",
    "read_spans",
    "span_positions",
    "span_processors",
]
