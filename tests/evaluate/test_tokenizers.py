"""Round trips on raw pictures and clips, and what is told where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from omnimoe.evaluate import Bench, RawCorpus, evaluate, psnr, ssim
from omnimoe.evaluate.tokenizers import fit, mel_distance
from omnimoe.generate import read_wave
from omnimoe.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def found(raw_folder, small, fresh, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return evaluate({"m": fresh}, corpus=small, metrics=["tokenizers"], raw=raw_folder, num=5, out=out)


def test_a_round_trip_is_what_the_tokenizer_does(found, raw_folder, small, fresh):
    bench = Bench(models={"m": fresh}, corpus=small, raw=RawCorpus(raw_folder, small), num=5)
    tokenizer = load_tokenizer("picture")
    real = [bench.picture(example) for example in bench.concepts("image")]
    again = tokenizer.decode_batch(tokenizer.encode_batch(np.stack(real)))
    measure = found.find("tokenizers", "pictures, PSNR", "round trip")
    assert measure.value == pytest.approx(np.mean([psnr(*pair) for pair in zip(real, again, strict=True)]), rel=1e-3)
    assert measure.low < measure.value < measure.high
    similarity = found.find("tokenizers", "pictures, SSIM", "round trip")
    assert similarity.value == pytest.approx(np.mean([ssim(*pair) for pair in zip(real, again, strict=True)]), rel=1e-3)
    assert 0.5 < similarity.value < 1
    assert 0 < found.find("tokenizers", "speech, mel distance", "round trip").value < 3


def test_it_leaves_a_contact_sheet(found):
    ((file, caption),) = found.sheets["tokenizers"]
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "above" in caption


def test_it_leaves_clips_beside_what_comes_back(found, raw_folder, small):
    files = [file for file, _ in found.sounds["tokenizers"]]
    names = [f"tokenizers-{place}-{name}.wav" for place in range(1, 6) for name in ("original", "decoded")]
    assert [file.name for file in files] == names
    raw = RawCorpus(raw_folder, small)
    first = Bench(models={}, corpus=small, num=5).concepts("speech")[0]
    (original, rate), (decoded, _) = (read_wave(file) for file in files[:2])
    assert rate == 16_000
    assert np.abs(original - raw.clip(first.index)).max() < 1e-3
    assert 0 < mel_distance(original, decoded) < 3
    captions = [caption for _, caption in found.sounds["tokenizers"][:2]]
    assert [caption.rpartition(": ")[2] for caption in captions] == ["original", "decoded"]
    assert files[0].name in found.to_dict()["metrics"]["tokenizers"]["files"]


def test_without_raw_it_is_a_second_round_trip_and_says_so(small, fresh):
    second = evaluate({"m": fresh}, corpus=small, metrics=["tokenizers"], num=5)
    assert second.columns("tokenizers") == ["second round trip"]
    assert any("Pass --raw DIR" in note for note in second.notes["tokenizers"])
    assert second.find("tokenizers", "pictures, PSNR", "second round trip").count == 5


def test_mel_distance_of_clips():
    clip = load_tokenizer("speech").decode(np.arange(40) * 17 % 1000)
    assert mel_distance(clip, clip) == 0
    assert mel_distance(clip, 0.5 * clip) == pytest.approx(0, abs=1e-4), "loudness does not count"
    noise = np.random.default_rng(0).normal(0, 0.1, len(clip)).astype(np.float32)
    assert mel_distance(clip, noise) > mel_distance(clip, clip + 0.05 * noise) > 0


def test_pictures_of_another_size_are_brought_to_one():
    picture = np.full((128, 128, 3), 200, np.uint8)
    assert fit(picture, picture[::2, ::2]).shape == (64, 64, 3)
    assert fit(picture, picture) is picture
