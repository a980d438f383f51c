"""Splits without leaks: rows that share a concept, a picture, a clip or a text go to one side together.

Splitting by caption alone leaks: one picture has captions in many languages, two captions share a clip, two concepts
share a translation. So rows are joined into connected components, and a component is placed as a whole by the digest
of its least concept. Components whose English names differ only loosely (number, article, "flag of", see
:func:`loose_key`), or that have one string in two languages, are then joined too, on the side of ``train`` if one of
them is there, else of ``val``; nothing ever leaves ``train`` that way. ``train``, ``val`` and ``test`` are disjoint in
this sense. ``drawing`` is a fourth, easier question: concepts of ``train`` in a drawing that was never seen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

SPLITS = ("train", "val", "test", "drawing")
_DISJOINT = ("train", "val", "test")
_SMALL_WORDS = {"a", "an", "the", "some", "of"}
_ENGLISH = "en"
_WRAPPERS = {"flag", "national", "official"}
# Emoji of animals and of the moon come twice, whole and as "... face".
_FACES = re.compile(
    "bear|bird|bunny|cat|chicken|cow|deer|dog|dragon|elephant|fish|fox|frog|goat|hamster|horse|koala|lion|monkey|moon|"
    "moose|mous|owl|panda|pig|rabbit|raccoon|rat|sheep|tiger|unicorn|wolf|zebra"
)
_FACING = re.compile(r":? facing (left|right)$", re.IGNORECASE)
_IRREGULAR = {
    "children": "child",
    "dice": "die",
    "feet": "foot",
    "geese": "goose",
    "lenses": "lens",
    "men": "man",
    "mice": "mouse",
    "people": "person",
    "teeth": "tooth",
    "women": "woman",
}
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


def loose_key(label: str) -> str:
    """What an English label names, regardless of number, spaces, hyphens and wrappers such as "flag of" as well.

    Equal for *banana* and *bananas*, *eye* and *the eyes*, *Bhutan* and *flag of Bhutan*, *horse* and *horse face*,
    *t-shirt* and *T shirt*, *St. Lucia* and *Saint Lucia*, *walking* and *walking: facing right*, *stop sign* and *stop
    sign, red*; different for *bell* and *bell pepper*. The key is no word: *cookies* and *cookie* both give *cooky*.

    Example:
        >>> loose_key("flag: Bhutan"), loose_key("the bananas"), loose_key("light-bulbs"), loose_key("hot face")
        ('bhutan', 'banana', 'lightbulb', 'hotface')
    """
    label = _FACING.sub("", label)
    if ":" not in label:  # after a colon commas list members: "family: man, boy"
        label = label.partition(",")[0] or label
    key = concept_key(label.replace("&", " and "))
    # What is left of "woman's" is a lone s.
    words = [_singular(w) for w in key.split() if w not in {"s", "and"}]
    if len(words) > 1 and words[-1] == "face" and _FACES.fullmatch(words[-2]):
        del words[-1]
    while len(words) > 1 and words[0] in _WRAPPERS:
        del words[0]
    while len(words) > 1 and words[-1] == "flag":
        del words[-1]
    return "".join("saint" if w == "st" else w for w in words) or key


def digest_split(key: str) -> str:
    """``train`` for about 80 keys in 100, ``val`` and ``test`` for 10 each; the same on every machine."""
    number = int(hashlib.sha1(key.encode()).hexdigest(), 16) % 100
    return "train" if number < 80 else "val" if number < 90 else "test"


def text_key(lang: str, text: str) -> tuple[str, str]:
    """A text as the leak check compares it: case, outer punctuation and spaces do not matter."""
    return lang, _string(text)


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
    components = _Components()
    for row in rows:
        for node in _nodes(row, look_alikes):
            components.join(("key", row["key"]), node)
    _name_groups(rows, components)
    fixed = {components.find(("key", key)) for key in always_train}
    for row in rows:
        root = components.find(("key", row["key"]))
        row["split"] = "train" if root in fixed else digest_split(row["group"])
    _hold_drawings(rows, held_drawings)
    _join_loosely(rows, components)


def assign_by_picture(rows: Sequence[dict[str, Any]]) -> None:
    """Writes ``group`` and ``split`` into every row so that pictures are held out and concepts are not.

    For a few concepts with many pictures each, such as the ten digits, which :func:`assign_splits` would put into
    ``train`` as a whole. Rows without a picture go to ``train``.

    Args:
        rows: mappings with ``key`` and ``image`` (index or -1).
    """
    for row in rows:
        row["group"] = row["key"]
        row["split"] = digest_split(f"{row['key']} {row['image']}") if row["image"] >= 0 else "train"


def check_leaks(
    rows: Iterable[dict[str, Any]], documents: Iterable[dict[str, Any]] = (), *, shares_concepts: bool = False
) -> dict[str, int]:
    """Proves that ``train``, ``val`` and ``test`` share no concept, component, picture, clip or text.

    Concepts and English captions are compared by :func:`loose_key` too, and no dictionary entry of ``train`` may have
    one of ``val`` or ``test`` as its headword. Pictures of ``drawing`` must not be in another split; its concepts are
    those of ``train`` on purpose. Running prose is not looked at.

    Args:
        rows: as written by :func:`assign_splits`.
        documents: running text with ``split`` and, for dictionary entries, ``heads``, the list of headwords.
        shares_concepts: look at pictures alone, for rows of :func:`assign_by_picture`.

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
        if split in _DISJOINT and not shares_concepts:
            things += [("concept", row["key"]), ("group", row["group"]), ("text", text_key(row["lang"], row["text"]))]
            things += [("loose concept", name) for name in _loose_names(row)]
            things.append(("string", _string(row["text"])))
            if row["audio"] >= 0:
                things.append(("clip", row["audio"]))
        for thing in things:
            first = seen.setdefault(thing, split)
            if first != split:
                leaks.append(f"{thing[0]} {thing[1]!r} is in {first} and {split}")
    for document in documents:
        for head in document.get("heads", ()):
            owner = seen.get(("loose concept", loose_key(head)))
            if document["split"] == "train" and owner in ("val", "test"):
                leaks.append(f"headword {head!r} of an entry in train is a caption of {owner}")
    if leaks:
        raise LeakError(
            f"{len(leaks)} leaks between splits: {'; '.join(leaks[:5])}; assign the splits anew with assign_splits "
            "and leave out entries with drop_defined"
        )
    return counts


def drop_defined(documents: Iterable[dict[str, Any]], rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents without the dictionary entries of ``train`` that define a concept of ``val`` or ``test``.

    They are left out rather than moved: the text tokenizer may have been trained on them.

    Args:
        documents: running text with ``split`` and, for dictionary entries, ``heads``, the list of headwords.
        rows: as written by :func:`assign_splits`.
    """
    held = {name for row in rows if row["split"] in ("val", "test") for name in _loose_names(row)}
    return [
        document
        for document in documents
        if document["split"] != "train" or not any(loose_key(head) in held for head in document.get("heads", ()))
    ]


class _Components:
    """Union and find."""

    def __init__(self) -> None:
        self._parents: dict[Hashable, Hashable] = {}

    def find(self, node: Hashable) -> Hashable:
        parents = self._parents
        parents.setdefault(node, node)
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def join(self, one: Hashable, other: Hashable) -> None:
        self._parents[self.find(other)] = self.find(one)


def _name_groups(rows: Sequence[dict[str, Any]], components: _Components) -> None:
    least: dict[Hashable, str] = {}
    for row in rows:
        root = components.find(("key", row["key"]))
        least[root] = min(least.get(root, row["key"]), row["key"])
    for row in rows:
        row["group"] = least[components.find(("key", row["key"]))]


def _join_loosely(rows: Sequence[dict[str, Any]], components: _Components) -> None:
    """Joins components of one loose name, or of one string in two languages.

    The joint one goes to the first of train, val, test that had a part of it.
    """
    for row in rows:
        components.join(("key", row["key"]), ("string", _string(row["text"])))
        for name in _loose_names(row):
            components.join(("key", row["key"]), ("loose", name))
    first: dict[Hashable, str] = {}
    for row in rows:
        root = components.find(("key", row["key"]))
        split = "train" if row["split"] == "drawing" else row["split"]
        first[root] = min(first.get(root, split), split, key=_DISJOINT.index)
    _name_groups(rows, components)
    for row in rows:
        if row["split"] != "drawing":
            row["split"] = first[components.find(("key", row["key"]))]


def _string(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower()).strip(" .!?,;:")


def _loose_names(row: dict[str, Any]) -> set[str]:
    return {loose_key(row["key"]), *([loose_key(row["text"])] if row["lang"] == _ENGLISH else [])}


def _singular(word: str) -> str:
    """One form for both numbers of a noun, not always a word: *knife* and *knives* both give *knif*."""
    word = _IRREGULAR.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if len(word) > 3 and word.endswith("ie"):
        return word[:-2] + "y"
    if len(word) > 3 and word.endswith(("ve", "fe")):
        return word[:-2] + "f"
    if len(word) > 3 and word.endswith(("sse", "xe", "ze", "che", "she", "oe", "use")):
        return word[:-1]
    return word


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
