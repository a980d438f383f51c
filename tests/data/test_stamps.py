"""Reading stamps: captions, languages, which file is the recording of which caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnimoe.data import stamps
from omnimoe.data.stamps import language, read_captions, read_stamps


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked package of our own in the place of the real one."""
    monkeypatch.setattr(stamps, "fetch", lambda source, cache: tmp_path)
    folder = tmp_path / "usr/share/tuxpaint/stamps/animals/birds"
    folder.mkdir(parents=True)
    (folder / "hen.txt").write_text(
        "A hen.\nfr.utf8=Une poule.\npt_BR.utf8=Uma |galinha.\nde.utf8=|\nca@valencia.utf8=x\n"
    )
    Image.new("RGB", (40, 20), "red").save(folder / "hen.png")
    for name in ("hen_desc.ogg", "hen_desc_fr.ogg", "hen_desc_ml.ogg", "hen.ogg", "hen2_desc_fr.ogg"):
        (folder / name).write_bytes(b"")
    (folder / "nothing.txt").write_text("No picture.\n")
    return folder


def test_captions_by_language(root: Path) -> None:
    assert read_captions(root / "hen.txt") == {
        "en": "A hen.",
        "fr": "Une poule.",
        "pt-br": "Uma galinha.",
        "ca-valencia": "x",
    }
    assert language("zh_TW") == "zh-tw"


def test_a_stamp_has_its_picture_and_the_recordings_of_its_captions(root: Path) -> None:
    (stamp,) = read_stamps(side=128)
    assert stamp.topic == "animals"
    assert stamp.pixels.shape == (128, 128, 3)
    assert stamp.pixels[64, 64].tolist() == [255, 0, 0]
    assert stamp.pixels[4, 64].tolist() == [255, 255, 255]
    # A recording in Malayalam has no caption, and the cry of the hen is no speech.
    assert {lang: file.name for lang, file in stamp.recordings.items()} == {
        "en": "hen_desc.ogg",
        "fr": "hen_desc_fr.ogg",
    }


def test_the_small_picture_is_the_large_one_scaled(root: Path) -> None:
    Image.effect_noise((90, 70), 80).convert("RGB").save(root / "hen.png")
    (small,), (large,) = read_stamps(side=64), read_stamps(side=128)
    from omnimoe.data.pictures import scaled

    assert np.array_equal(scaled(large.pixels, 64), small.pixels)
