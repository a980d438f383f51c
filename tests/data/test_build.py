"""Parts of the builder that need no package: pictures, titles, clips, the licence page, refusals."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnimoe.data.build import SETS, build_corpus, train_text_tokenizer
from omnimoe.data.licenses import license_page
from omnimoe.data.openclipart import clean_title, usable_title
from omnimoe.data.pictures import PictureError, fingerprint, render_svg, scaled, to_square
from omnimoe.data.speech import SAMPLE_RATE, to_clip
from omnimoe.data.texts import bounded, is_fit

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}">'
    '<rect width="100%" height="100%" fill="{c}"/></svg>'
)


def test_drawings_are_centred_on_white() -> None:
    pytest.importorskip("resvg_py")
    pixels = render_svg(SVG.format(w="40mm", h="20mm", c="red"))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels[32, 32].tolist() == [255, 0, 0]
    assert pixels[4, 32].tolist() == [255, 255, 255]


def test_a_drawing_is_rendered_at_128_and_the_small_one_is_that_one_scaled() -> None:
    pytest.importorskip("resvg_py")
    fine = '<svg xmlns="http://www.w3.org/2000/svg" width="128" height="128"><path d="{}" stroke="black"/></svg>'
    lines = " ".join(f"M0 {2 * row}.5 H128" for row in range(64))
    large, small = render_svg(fine.format(lines), 128), render_svg(fine.format(lines), 64)
    assert large.shape == (128, 128, 3)
    assert small.shape == (64, 64, 3)
    # Lines of one pixel: black and white in turn, which no enlarged picture of 64 pixels could show.
    assert np.ptp(large[40:80, 64, 0]) == 255
    assert np.ptp(small[20:40, 32, 0]) < 64
    assert np.array_equal(scaled(large, 64), small)


@pytest.mark.parametrize("svg", [SVG.format(w=10, h=10, c="white"), "no drawing", ""])
def test_blank_and_broken_drawings_are_refused(svg: str) -> None:
    pytest.importorskip("resvg_py")
    with pytest.raises(PictureError):
        render_svg(svg)


def test_look_alikes_share_a_fingerprint() -> None:
    shades = np.linspace(0, 190, 64).astype(np.uint8)
    picture = to_square(Image.fromarray(np.stack([np.tile(shades, (64, 1))] * 3, -1)))
    near = picture.copy()
    near[10, 10] ^= 1
    assert fingerprint(picture) == fingerprint(near)
    assert fingerprint(picture) != fingerprint(picture[:, ::-1])
    line = np.full((64, 64, 3), 255, np.uint8)
    other = line.copy()
    line[5], other[:, 50] = 0, 0
    assert fingerprint(line) != fingerprint(other)


@pytest.mark.parametrize(
    ("title", "caption"),
    [
        ("Clipart by Nicu Buculei - baloon1_04", "baloon1"),
        ("Fire_Engine 02", "fire engine"),
        ("LED Rounded (Green)", "led rounded"),
        (" The  Lion. ", "the lion"),
        ("stopSign", "stop sign"),
    ],
)
def test_titles_become_captions(title: str, caption: str) -> None:
    assert clean_title(title) == caption


@pytest.mark.parametrize(
    ("license", "title", "usable"),
    [
        ("http://web.resource.org/cc/PublicDomain", "lion", "lion"),
        ("http://web.resource.org/cc/PublicDomain", "Lemon SVG theme", "fire engine"),
        ("http://creativecommons.org/licenses/GPL/2.0/", "lion", None),
        ("", "lion", None),
        ("http://web.resource.org/cc/PublicDomain", "simbolo egizio", None),
    ],
)
def test_only_stated_public_domain_with_an_english_title_is_used(
    tmp_path: Path, license: str, title: str, usable: str | None
) -> None:
    path = tmp_path / "animals" / "fire_engine_.svg"
    path.parent.mkdir()
    path.write_text(f'<cc:Work><dc:title>{title}</dc:title><cc:license rdf:resource="{license}"/></cc:Work>')
    words = frozenset({"lion", "fire", "engine"})
    assert usable_title(path, tmp_path, words, collections.Counter()) == usable


def test_clips_are_trimmed_resampled_and_loud() -> None:
    pytest.importorskip("scipy")
    tone = np.sin(np.arange(24_000) * 0.1) * 0.1
    wave = np.concatenate([np.zeros(24_000), tone, np.zeros(24_000)])
    clip = to_clip(wave, 24_000)
    assert clip.dtype == np.int16
    assert len(clip) == pytest.approx(SAMPLE_RATE, rel=0.12)
    assert np.abs(clip.astype(int)).max() == pytest.approx(0.89 * 32767, rel=0.01)


def test_a_bounded_part_is_the_same_each_time_and_in_order() -> None:
    documents = [(f"d{i:03}", "x" * 100) for i in range(50)]
    part = bounded(iter(documents), 1000)
    assert len(part) == 10
    assert part == sorted(part) == bounded(iter(documents), 1000)


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_source_is_on_the_licence_page(name: str) -> None:
    made = SETS[name]
    page = license_page(name, made.sources, 64, permissive=made.permissive)
    for source in made.sources:
        assert f"| {source.name} | {source.used} | {source.license} | [{source.credit}]" in page
    copyleft = [s.name for s in made.sources if s.license.startswith("CC-BY-SA") or "GPL" in s.license]
    assert bool(copyleft) != made.permissive
    assert ("may be done with weights" in page) != made.permissive
    assert len({source.name for source in made.sources}) == len(made.sources)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown corpus 'Q'; known: P, S, D"):
        build_corpus("Q", out=tmp_path / "q")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        build_corpus("P", out=tmp_path / "full")
    with pytest.raises(ValueError, match="image_size must be 64 or 128, got 96"):
        build_corpus("P", out=tmp_path / "p", image_size=96)


def test_unfit_words_are_told_within_a_caption_and_not_within_a_word() -> None:
    assert not is_fit("Sexy lady")
    assert is_fit("grapes, therapeutic")


def test_byte_pairs_are_learned_from_training_text_of_related_languages_alone(tmp_path):
    rows = [
        {"split": "train", "lang": "en", "text": "a cat sat on a mat"},
        {"split": "test", "lang": "en", "text": "zzzz zzzz zzzz zzzz"},
        {"split": "train", "lang": "ru", "text": "кот кот кот кот кот"},
    ]
    running = [{"split": "train", "text": "the cat sat and sat " * 4}, {"split": "val", "text": "qqqq qqqq " * 9}]
    for name, held in (("rows", rows), ("text", running)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, held)), encoding="utf-8")
    tokenizer = train_text_tokenizer(tmp_path, vocab_size=280)
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(" cat sat")) < len(" cat sat")
    for unseen in ("zzzz", "qqqq", "кот"):
        assert len(tokenizer.encode(unseen)) == len(unseen.encode())
    assert tokenizer.decode(tokenizer.encode("кот zzzz")) == "кот zzzz"
