"""Text as recognisers are scored on it."""

from __future__ import annotations

import functools


def normalize_transcript(text: str) -> str:
    """What two transcripts of one clip should share, whatever their spelling: the form Whisper is scored in.

    Lower case; no punctuation, accents, fillers (*um*) or words in brackets; contractions written out (*it's*, *it
    is*), titles too (*Mr*, *mister*); numbers as numerals (*twenty-one*, *21*), with currency and percent signs;
    hyphens as spaces. British and American spellings stay as they are, and so do compounds (*lightbulb*, *light bulb*).

    Args:
        text: English.

    Example:
        >>> normalize_transcript("Mr. Hook had got twenty-one fish-hooks, um, [music] it's TRUE!")
        'mister hook had got 21 fish hooks it is true'
    """
    return _normalizer()(text).strip()


@functools.cache
def _normalizer():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # The argument maps British spellings to American ones; the list itself is not part of the library.
    return EnglishTextNormalizer({})
