"""Splits by connected component: what shares anything stays together, and the check finds what does not."""

from __future__ import annotations

import pytest

from omnimoe.data.splits import (
    LeakError,
    assign_by_picture,
    assign_splits,
    check_leaks,
    concept_key,
    digest_split,
    drop_defined,
    loose_key,
    text_key,
)


def row(key: str, text: str, image: int = -1, audio: int = -1, lang: str = "en") -> dict:
    return {"key": key, "text": text, "image": image, "audio": audio, "lang": lang}


def test_rows_that_share_anything_share_a_group() -> None:
    rows = [
        row("lion", "lion", 0, 0),
        row("leo", "leo", 0, 1),
        row("zodiac", "zodiac sign", 1, 1),
        row("fairy", "Sign", 2, lang="de"),
        row("zodiac", "sign.", 3, lang="de"),
        row("tiger", "tiger", 4, 4),
    ]
    assign_splits(rows)
    assert {r["group"] for r in rows[:5]} == {"fairy"}
    assert rows[5]["group"] == "tiger"
    assert rows[0]["split"] == digest_split("fairy")


def test_look_alikes_stay_together() -> None:
    rows = [row("a thing", "a thing", 0), row("another", "another", 1), row("third", "third", 2)]
    assign_splits(rows, look_alikes=["x", "x", "y"])
    assert rows[0]["group"] == rows[1]["group"] != rows[2]["group"]


def test_shares_are_near_80_10_10_and_do_not_leak() -> None:
    rows = [row(f"thing {i}", f"thing {i}", i, i) for i in range(3000)]
    assign_splits(rows)
    counts = check_leaks(rows)
    assert counts["train"] == pytest.approx(2400, rel=0.05)
    assert counts["val"] == pytest.approx(300, rel=0.2)
    assert counts["test"] == pytest.approx(300, rel=0.2)


def test_a_component_can_be_placed_in_train() -> None:
    key = next(f"k{i}" for i in range(100) if digest_split(f"k{i}") == "test")
    rows = [row(key, key, 0)]
    assign_splits(rows, always_train=[key])
    assert rows[0]["split"] == "train"


def test_drawings_are_held_out_of_concepts_that_stay_in_train() -> None:
    rows = [row("digit", "digit", i) for i in range(100)]
    assign_splits(rows, always_train=["digit"])
    counts = check_leaks(rows)
    assert counts == {"train": 90, "val": 0, "test": 0, "drawing": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": 0}, "picture 0 is in train and test"),
        ({"audio": 0}, "clip 0 is in train and test"),
        ({"key": "lion"}, "concept 'lion' is in train and test"),
        ({"text": "Lion!"}, "text"),
        ({"split": "exam"}, "must be one of train"),
    ],
)
def test_every_kind_of_leak_is_found(change: dict, message: str) -> None:
    rows = [
        {**row("lion", "lion", 0, 0), "group": "lion", "split": "train"},
        {**row("tiger", "tiger", 1, 1), "group": "tiger", "split": "test", **change},
    ]
    with pytest.raises(LeakError, match=message):
        check_leaks(rows)


def test_keys() -> None:
    assert concept_key("Woman: surfing") == concept_key("the man surfing") == "surfing"
    assert concept_key("person") == "person"
    assert concept_key("!") == "!"
    assert text_key("en", " A  Lion. ") == ("en", "a lion")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("banana", "bananas"),
        ("the eye", "eyes"),
        ("bhutan", "flag of Bhutan"),
        ("flag: Bhutan", "Bhutan flag"),
        ("the official flag of israel", "Israel"),
        ("saint lucia", "flag of St. Lucia"),
        ("trinidad and tobago", "flag of Trinidad & Tobago"),
        ("horse", "horse face"),
        ("mouse", "mouse face"),
        ("light bulb", "light-bulbs"),
        ("lightbulb", "light bulb"),
        ("boxes", "box"),
        ("axes", "axe"),
        ("cookies", "cookie"),
        ("ties", "tie"),
        ("knives", "knife"),
        ("gloves", "glove"),
        ("houses", "house"),
        ("buses", "bus"),
        ("mice", "mouse"),
        ("lenses", "lens"),
        ("woman\u2019s boot", "boots"),
        ("person walking", "woman walking: facing right"),
        ("stop sign", "stop sign, right font"),
    ],
)
def test_loose_keys_of_one_thing_agree(one: str, other: str) -> None:
    assert loose_key(one) == loose_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bell", "bell pepper"),
        ("hot face", "hot"),
        ("keycap 1", "keycap 2"),
        ("horse", "carousel horse"),
        ("niger", "nigeria"),
        ("bus", "bush"),
        ("pie", "pi"),
        ("mouse", "moose"),
        ("flag", "crossed flags"),
        ("traffic light", "traffic light: red"),
    ],
)
def test_loose_keys_of_two_things_differ(one: str, other: str) -> None:
    assert loose_key(one) != loose_key(other)


NOUNS = [f"{a}{b}{c}" for a in "bdfglmnprt" for b in "aeiou" for c in ("ck", "lt", "mp", "nd", "rk")]


def test_names_that_differ_loosely_join_on_the_side_of_train_then_val() -> None:
    joined = {}
    for noun in NOUNS:
        rows = [row(noun, noun, 0), row(f"flag {noun}", f"flag of {noun}", 1), row("other", "Blume", 2, lang="de")]
        before = {digest_split(r["key"]) for r in rows[:2]}
        assign_splits(rows)
        after = {r["split"] for r in rows[:2]}
        assert after == {min(before, key=("train", "val", "test").index)}
        assert {r["group"] for r in rows} == {min(noun, f"flag {noun}"), "other"}
        check_leaks(rows)
        joined[frozenset(before)] = after
    assert joined[frozenset({"train", "test"})] == joined[frozenset({"train", "val"})] == {"train"}
    assert joined[frozenset({"val", "test"})] == {"val"}


def test_nothing_leaves_train_and_drawings_stay() -> None:
    names = [f"{noun}{end}" for noun in NOUNS for end in ("", "s")]
    rows = [row(name, name, 5 * i + k) for i, name in enumerate(names) for k in range(5)]
    assign_splits(rows)
    first = [digest_split(r["key"]) for r in rows]
    moved = [(old, r["split"]) for old, r in zip(first, rows, strict=True) if old != r["split"]]
    assert {pair for pair in moved if pair[0] == "train"} <= {("train", "drawing")}
    assert {("val", "train"), ("test", "train")} <= set(moved)
    # Only what was in train from the start gives a drawing.
    assert all(old == "train" for old, new in moved if new == "drawing")
    assert check_leaks(rows)["drawing"] > 0


def test_one_string_in_two_languages_joins_and_is_found_where_it_is_parted() -> None:
    for noun in NOUNS:
        rows = [row(f"{noun}er", "envelop", 0, lang="nl"), row(noun, "Envelop", 1)]
        before = {digest_split(r["key"]) for r in rows}
        assign_splits(rows)
        assert {r["split"] for r in rows} == {min(before, key=("train", "val", "test").index)}
        check_leaks(rows)
        rows[0]["split"], rows[1]["split"], rows[0]["group"] = "train", "test", "other"
        with pytest.raises(LeakError, match="string 'envelop' is in train and test"):
            check_leaks(rows)


def held_out(text: str, split: str = "test") -> list[dict]:
    return [
        {**row("lion", "lion", 0, 0), "group": "lion", "split": "train"},
        {**row(text, text, 1, 1), "group": text, "split": split},
    ]


@pytest.mark.parametrize("text", ["lions", "flag of Lion", "lion face", "the-lion"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_loose_leaks_are_found(text: str, split: str) -> None:
    with pytest.raises(LeakError, match="loose concept 'lion' is in train and " + split):
        check_leaks(held_out(text, split))


@pytest.mark.parametrize("split", ["val", "test"])
def test_entries_that_define_a_held_out_concept_are_found_and_dropped(split: str) -> None:
    rows = held_out("goggles", split)
    defines = {"split": "train", "text": "goggle, eyewear: tight-fitting spectacles", "heads": ["goggle", "eyewear"]}
    keep = [
        {"split": "train", "text": "lion: a cat", "heads": ["lion"]},
        {"split": "train", "text": "spectacles: not goggles", "heads": ["spectacles"]},
        {"split": "train", "text": "and he wore goggles", "heads": []},
        {"split": "train", "text": "goggles, said he"},
        {"split": "test", "text": "goggles: tight-fitting spectacles", "heads": ["goggles"]},
    ]
    with pytest.raises(LeakError, match=f"headword 'goggle' of an entry in train is a caption of {split}"):
        check_leaks(rows, [*keep, defines])
    assert drop_defined([defines, *keep], rows) == keep
    assert check_leaks(rows, keep)["train"] == 1


def test_pictures_of_shared_concepts_are_held_out_one_by_one() -> None:
    rows = [row(f"digit {i % 3}", f"digit {i % 3}", i, i % 3) for i in range(600)] + [row("digit 0", "digit 0")]
    assign_by_picture(rows)
    counts = check_leaks(rows, shares_concepts=True)
    assert counts["train"] == pytest.approx(480, rel=0.1)
    assert counts["val"] > 30
    assert counts["test"] > 30
    assert rows[-1]["split"] == "train"
    with pytest.raises(LeakError, match="concept 'digit"):
        check_leaks(rows)
    rows[1]["split"], rows[2]["split"], rows[2]["image"] = "train", "test", rows[1]["image"]
    with pytest.raises(LeakError, match="picture 1 is in train and test"):
        check_leaks(rows, shares_concepts=True)
