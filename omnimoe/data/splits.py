"""Splits without leaks: rows that share a concept, a picture, a clip or a text go to one side together.

Splitting by caption alone leaks: one picture has captions in many languages, two captions share a clip, two concepts
share a translation. So rows are joined into connected components, and a component is placed as a whole by the digest
of its least concept. ``train``, ``val`` and ``test`` are disjoint in this sense. ``drawing`` is a fourth, easier
question: concepts of ``train`` in a drawing that was never seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

SPLITS = ("train", "val", "test", "drawing")
_DISJOINT = ("train", "val", "test")
_SMALL_WORDS = {"a", "an", "the", "some", "of"}
_PERSONS = {"man", "woman", "person", "men", "women", "people", "boy", "girl"}


class LeakError(ValueError):
    """Something of one split is also in another."""


def concept_key(label: str) -> str:
    """What a label names, regardless of articles, punctuation and the sex of a depicted person.

    Example:
        >>> concept_key("Woman surfing"), concept_key("the man"), concept_key("flag of Japan")
        ('surfing', 'man', 'flag japan')
    """
    words = [w for w in re.sub(r"[^\w ]", " ", label.lower()).split() if w not in _SMALL_WORDS]
    others = [w for w in words if w not in _PERSONS]
    return " ".join(others or words) or label.lower().strip()


def digest_split(key: str) -> str:
    """``train`` for about 80 keys in 100, ``val`` and ``test`` for 10 each; the same on every machine."""
    number = int(hashlib.sha1(key.encode()).hexdigest(), 16) % 100
    return "train" if number < 80 else "val" if number < 90 else "test"


def text_key(lang: str, text: str) -> tuple[str, str]:
    """A text as the leak check compares it: case, outer punctuation and spaces do not matter."""
    return lang, re.sub(r"\s+", " ", text.lower()).strip(" .!?,;:")


def assign_splits(
    rows: Sequence[dict[str, Any]],
    *,
    look_alikes: Sequence[Hashable] = (),
    always_train: Iterable[str] = (),
    held_drawings: int = 10,
) -> None:
    """Writes ``group`` and ``split`` into every row.

    Args:
        rows: mappings with ``key``, ``image`` and ``audio`` (index or -1), ``lang``, ``text``.
        look_alikes: one value a picture, equal for pictures that must not be parted.
        always_train: concepts whose component is placed in ``train`` whatever its digest.
        held_drawings: one concept of ``train`` in so many gives one of its pictures to ``drawing``, if it has four.
    """
    parents: dict[Hashable, Hashable] = {}

    def find(node: Hashable) -> Hashable:
        parents.setdefault(node, node)
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for row in rows:
        for node in _nodes(row, look_alikes):
            parents[find(node)] = find(("key", row["key"]))
    least: dict[Hashable, str] = {}
    for row in rows:
        root = find(("key", row["key"]))
        least[root] = min(least.get(root, row["key"]), row["key"])
    fixed = {find(("key", key)) for key in always_train}
    for row in rows:
        root = find(("key", row["key"]))
        row["group"] = least[root]
        row["split"] = "train" if root in fixed else digest_split(row["group"])
    _hold_drawings(rows, held_drawings)


def check_leaks(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Proves that ``train``, ``val`` and ``test`` share no concept, component, picture, clip or text.

    Pictures of ``drawing`` must not be in another split; its concepts are those of ``train`` on purpose.

    Args:
        rows: as written by :func:`assign_splits`.

    Returns:
        Split to number of rows.

    Raises:
        LeakError: with the first shared things by name.
    """
    seen: dict[tuple[str, Hashable], str] = {}
    counts = dict.fromkeys(SPLITS, 0)
    leaks = []
    for row in rows:
        split = row["split"]
        if split not in counts:
            raise LeakError(f"row {row.get('text')!r} has split {split!r}; it must be one of {', '.join(SPLITS)}")
        counts[split] += 1
        things: list[tuple[str, Hashable]] = [("picture", row["image"])] if row["image"] >= 0 else []
        if split in _DISJOINT:
            things += [("concept", row["key"]), ("group", row["group"]), ("text", text_key(row["lang"], row["text"]))]
            if row["audio"] >= 0:
                things.append(("clip", row["audio"]))
        for thing in things:
            first = seen.setdefault(thing, split)
            if first != split:
                leaks.append(f"{thing[0]} {thing[1]!r} is in {first} and {split}")
    if leaks:
        raise LeakError(
            f"{len(leaks)} leaks between splits: {'; '.join(leaks[:5])}; assign the splits anew with assign_splits"
        )
    return counts


def _nodes(row: dict[str, Any], look_alikes: Sequence[Hashable]) -> Iterable[Hashable]:
    yield "text", text_key(row["lang"], row["text"])
    if row["audio"] >= 0:
        yield "audio", row["audio"]
    if row["image"] >= 0:
        yield "image", row["image"]
        if len(look_alikes):
            yield "look", look_alikes[row["image"]]


def _hold_drawings(rows: Sequence[dict[str, Any]], one_in: int) -> None:
    pictures: dict[str, set[int]] = {}
    keys: dict[int, set[str]] = {}
    for row in rows:
        if row["split"] == "train" and row["image"] >= 0:
            pictures.setdefault(row["key"], set()).add(row["image"])
            keys.setdefault(row["image"], set()).add(row["key"])
    held: set[int] = set()
    for key, images in pictures.items():
        own = sorted(i for i in images if keys[i] == {key})
        number = int(hashlib.sha1(f"drawing {key}".encode()).hexdigest(), 16)
        if len(own) < 4 or (len(own) < 40 and number % one_in):
            continue
        # A concept with very many pictures (a handwritten digit) gives one in so many of them.
        take = 1 if len(own) < 40 else len(own) // one_in
        held.update(own[(number + i * (len(own) // take)) % len(own)] for i in range(take))
    for row in rows:
        if row["image"] in held:
            row["split"] = "drawing"
