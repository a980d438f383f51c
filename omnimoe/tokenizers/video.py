"""Video to ids or rows: frames through any picture tokenizer, one after the other, each with its moment as position.

Which frames are taken is one rule. With a clip of d seconds, frames stand ``step = max(1 / frames_per_second,
d / max_frames)`` seconds apart from the first moment on, and each is the picture shown at its moment. So a short clip
is read at the rate of the config, and a longer one evenly over its whole length.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError
from omnimoe.tokenizers.adapters import read_config, write_config
from omnimoe.tokenizers.base import Tokenizer, TokenizerError, load_tokenizer, register_tokenizer

logger = logging.getLogger(__name__)

_EARLY = 1e-6
"""Seconds by which a frame's time may lie above the moment it is shown at, from rounding."""

_DRAWN_TEXT = ("ansi", "bintext", "idf", "xbin")
"""Codecs of FFmpeg that draw characters on a screen, by which almost any file of text is a film."""

Frames = Iterable[tuple[float, Callable[[], Any]]]
"""Time in seconds from the start, and a function that gives the picture."""


@register_tokenizer("video")
class VideoTokenizer(Tokenizer):
    """Frames to spans of a picture tokenizer, laid end to end.

    Args:
        config: which frames are taken.
        picture: the tokenizer of each frame, with a fixed number of tokens; its ids or rows are those of the video.
    """

    modality = "video"
    config: Config

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        picture: str = "picture"
        """Registered name of the picture tokenizer."""
        frames_per_second: float = 2.0
        """Frames taken of a second, at most."""
        max_frames: int = 16
        """Frames taken of a clip, at most."""

    def __init__(self, config: Config, *, picture: Tokenizer) -> None:
        super().__init__(config.replace(picture=picture.registered_name or config.picture))
        if config.frames_per_second <= 0 or config.max_frames < 1:
            raise ConfigError(
                "frames_per_second must be positive and max_frames at least 1, "
                f"got {config.frames_per_second} and {config.max_frames}"
            )
        if picture.num_tokens is None or picture.grid is None or len(picture.grid) != 2:
            raise TokenizerError(
                f"{type(picture).__name__} has no fixed grid of tokens; a video needs a tokenizer of pictures"
            )
        self.picture = picture
        self.vocab_size, self.channels = picture.vocab_size, picture.channels
        self.grid = picture.grid

    @property
    def frame_size(self) -> int:
        """Tokens of a frame: those of a picture."""
        return self.picture.num_tokens or 1

    def positions(self, length: int) -> Tensor:
        """Frame, row and column of each position of a span, ``(length, 3)`` int64, from 0."""
        inside = self.picture.positions(self.frame_size)
        place = torch.arange(length)
        found = inside[place % self.frame_size]
        found[:, 0] = place // self.frame_size
        return found

    def frames(self, raw: Any, frames_per_second: float | None = None) -> list[Any]:
        """The pictures that are encoded.

        Args:
            raw: ``(T, H, W, 3)`` uint8, an array or tensor; a sequence of what the picture tokenizer takes; or the path
                of an animated picture that Pillow reads or of a video that PyAV reads, or such a file opened in binary.
            frames_per_second: of an array or sequence; None where its frames are as far apart as the config says. A
                file says its own.

        Returns:
            1 to ``max_frames`` pictures.

        Raises:
            TokenizerError: if ``raw`` is not a video, is empty, or cannot be read, or PyAV is needed and missing.
        """
        rate = self.config.frames_per_second if frames_per_second is None else frames_per_second
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise TokenizerError(f"frames_per_second must be a positive number, got {frames_per_second!r}")
        if isinstance(raw, str | PathLike | io.IOBase):
            if frames_per_second is not None:
                raise TokenizerError("a file says its own frames_per_second; leave it out")
            found = self._from_file(raw if isinstance(raw, io.IOBase) else Path(raw))
            if not found:
                raise TokenizerError(f"{_name(raw)} has no frame that can be decoded; is the file complete?")
            return found
        if isinstance(raw, Tensor):
            raw = raw.detach().cpu().numpy()
        if isinstance(raw, np.ndarray) and (raw.ndim != 4 or raw.shape[3] != 3 or raw.dtype != np.uint8):
            raise TokenizerError(f"an array of a video is uint8 (T, H, W, 3), not {raw.dtype} {raw.shape}")
        if not isinstance(raw, np.ndarray | Sequence) or isinstance(raw, bytes):
            raise TokenizerError(
                f"a video is a path, a sequence of pictures or a uint8 array (T, H, W, 3), not {type(raw).__name__}"
            )
        if not len(raw):
            raise TokenizerError("a video needs at least one frame, got none")
        timed = ((i / rate, lambda picture=picture: picture) for i, picture in enumerate(raw))
        return list(shown_at(timed, self.moments(len(raw) / rate)))

    def moments(self, duration: float) -> list[float]:
        """The times in seconds that are looked at in a clip of ``duration`` seconds; the first is 0."""
        step = max(1 / self.config.frames_per_second, duration / self.config.max_frames)
        # A little less, so that a duration which is a whole number of steps does not gain one by rounding.
        count = max(1, min(self.config.max_frames, int(np.ceil(duration / step - _EARLY))))
        return [i * step for i in range(count)]

    def encode(self, raw: Any, frames_per_second: float | None = None) -> Tensor:
        """A video to ids ``(frames * frame_size,)`` int64, frame by frame.

        Args:
            raw: see :meth:`frames`, and so is ``frames_per_second``.

        Raises:
            TokenizerError: see :meth:`frames`; and if a frame is no picture, or the picture tokenizer gives rows alone.
        """
        return _each(self.picture, "encode", self.frames(raw, frames_per_second)).flatten()

    def encode_rows(self, raw: Any, frames_per_second: float | None = None) -> Tensor:
        """A video to rows ``(frames * frame_size, C)`` float32; otherwise as :meth:`encode`."""
        return _each(self.picture, "encode_rows", self.frames(raw, frames_per_second)).flatten(0, 1)

    def decode(self, ids: Any) -> np.ndarray:
        """Ids ``(n,)`` to frames ``(T, H, W, 3)`` uint8. A last frame that is not whole is left out with a warning.

        Raises:
            TokenizerError: if an id is out of range, there is not one whole frame, or there is more than one axis.
        """
        if not self.is_discrete:
            return self.picture.decode(ids)
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes the ids of one video, not {tuple(ids.shape)}")
        return self._decoded("decode", ids)

    def decode_rows(self, rows: Any) -> np.ndarray:
        """Rows ``(n, C)`` to frames ``(T, H, W, 3)`` uint8; otherwise as :meth:`decode`."""
        if not self.is_continuous:
            return self.picture.decode_rows(rows)
        rows = self.check_rows(rows)
        if rows.ndim != 2:
            raise TokenizerError(f"decode_rows takes the rows of one video, not {tuple(rows.shape)}")
        return self._decoded("decode_rows", rows)

    def _decoded(self, method: str, span: Tensor) -> np.ndarray:
        count, rest = divmod(len(span), self.frame_size)
        if not count:
            raise TokenizerError(f"a frame has {self.frame_size} tokens, and there are only {len(span)}")
        if rest:
            logger.warning("%d tokens after the last whole frame are left out", rest)
        return np.stack([getattr(self.picture, method)(frame) for frame in span[: len(span) - rest].chunk(count)])

    def _from_file(self, file: Any) -> list[Any]:
        if isinstance(file, Path) and not file.is_file():
            raise TokenizerError(f"no video at {file}")
        try:
            with Image.open(file) as picture:
                return self._from_animation(picture)
        except UnidentifiedImageError:
            if not isinstance(file, Path):
                file.seek(0)
            return self._from_video(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise TokenizerError(f"the video {_name(file)} cannot be read: {error}") from error

    def _from_animation(self, picture: Image.Image) -> list[Any]:
        times = [0.0]
        for frame in ImageSequence.Iterator(picture):
            frame.load()  # some formats know the duration only then
            # 0 leaves it to the viewer; a tenth of a second is what viewers take.
            times.append(times[-1] + (frame.info.get("duration") or 100) / 1000)
        # The iterator changes one picture in place, so what may be shown later is copied now.
        frames = (frame.copy() for frame in ImageSequence.Iterator(picture))
        timed = ((time, lambda frame=frame: frame) for time, frame in zip(times, frames, strict=False))
        return list(shown_at(timed, self.moments(times[-1])))

    def _from_video(self, file: Any) -> list[Any]:
        try:
            import av
        except ImportError as error:
            raise TokenizerError(f"reading {_name(file)} needs PyAV ({error}): pip install 'omnimoe[video]'") from error
        try:
            with av.open(str(file) if isinstance(file, Path) else file) as container:
                if not container.streams.video:
                    raise TokenizerError(f"{_name(file)} has no video in it")
                stream = container.streams.video[0]
                if stream.codec_context.name in _DRAWN_TEXT:
                    raise TokenizerError(f"{_name(file)} is text and no film")
                # Packets carry times without being decoded, so the length is known first and memory stays small.
                unit = float(stream.time_base or 0)
                times = [packet.pts * unit for packet in container.demux(stream) if packet.pts is not None]
                if not times:
                    raise TokenizerError(f"{_name(file)} has no frames")
                first, last = min(times), max(times)
                usual = 1 / float(stream.average_rate) if stream.average_rate else 0.0
                container.seek(0)
                decoded = (
                    (frame.pts * unit - first, _rgb(frame))
                    for frame in container.decode(stream)
                    if frame.pts is not None
                )
                return list(shown_at(decoded, self.moments(last - first + usual)))
        except av.FFmpegError as error:
            raise TokenizerError(f"the video {_name(file)} cannot be read: {error}") from error

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str] | None = None, *, picture: Tokenizer | str | None = None, **options: Any
    ) -> Self:
        """A tokenizer of video over one of pictures.

        Args:
            path: a folder of :meth:`save_pretrained`; None for the picture tokenizer that ships.
            picture: another picture tokenizer, or the name of one that ships.
            options: ``frames_per_second`` and ``max_frames``.

        Raises:
            TokenizerError: if there is no such folder, or the picture tokenizer cannot be read.
        """
        config = cls.Config()
        if path is not None:
            config = read_config(cls, Path(path) / "video_tokenizer.json")
            picture = picture or load_tokenizer(config.picture, Path(path) / "video_tokenizer")
        if not isinstance(picture, Tokenizer):
            picture = load_tokenizer(picture or config.picture)
        return cls(config.replace(**options), picture=picture)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes ``video_tokenizer.json``, and the picture tokenizer into a folder ``video_tokenizer``."""
        self.picture.save_pretrained(Path(path) / "video_tokenizer")
        write_config(self.config, Path(path) / "video_tokenizer.json")


def shown_at(frames: Frames, moments: Sequence[float]) -> Iterator[Any]:
    """The picture that is shown at each moment: the last one whose time has come.

    Args:
        frames: in order of time; read once, and only pictures that are shown are asked for.
        moments: seconds, rising; the first frame is shown before its time, the last one for ever.
    """
    waiting, current = list(moments), None
    for time, picture in frames:
        while waiting and current is not None and waiting[0] < time - _EARLY:
            waiting.pop(0)
            yield current()
        if not waiting:
            return
        current = picture
    if current is not None:
        for _ in waiting:
            yield current()


def _name(file: Any) -> str:
    return str(file) if isinstance(file, str | PathLike) else str(getattr(file, "name", "that was opened"))


def _rgb(frame: Any) -> Callable[[], np.ndarray]:
    return lambda: frame.to_ndarray(format="rgb24")


def _each(tokenizer: Tokenizer, method: str, pictures: list[Any]) -> Tensor:
    """``(B, n)`` ids or ``(B, n, C)`` rows, at once where the tokenizer can."""
    at_once = getattr(tokenizer, f"{method}_batch", None)
    return at_once(pictures) if at_once else torch.stack([getattr(tokenizer, method)(raw) for raw in pictures])
