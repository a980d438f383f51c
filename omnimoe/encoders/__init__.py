"""Pretrained encoders: pictures, speech and text to feature rows, from wheels, local folders or the Hub."""

from __future__ import annotations

from omnimoe.encoders.base import ENCODERS, Encoder, EncoderError, Features, load_encoder, register_encoder
from omnimoe.encoders.transcripts import normalize_transcript

__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderError",
    "Features",
    "load_encoder",
    "normalize_transcript",
    "register_encoder",
]
