"""Splits by connected component: what shares anything stays together, and the check finds what does not."""

from __future__ import annotations

import pytest

from omnimoe.data.splits import LeakError, assign_splits, check_leaks, concept_key, digest_split, text_key


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
