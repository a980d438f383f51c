"""From words and pictures to words, pictures, clips and their sound, by a Cosmos3 checkpoint as it is published.

To draw, a document is words, or a picture and words for a clip that begins with it; to answer it is words and pictures
in any order. What surrounds the words, the sampler and its times are those that the checkpoint was published with.
Documents of one call are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image

from omnimoe.checkpoint import CheckpointError, read_json
from omnimoe.encoders.raw import whole_pictures
from omnimoe.guidance import as_guidance
from omnimoe.inputs import check_whole
from omnimoe.joint_denoise import SchedulerSampler, denoise_jointly
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.pipelines.base import (
    Clip,
    Loading,
    Part,
    Pipeline,
    document_seeds,
    open_published,
    read_documents,
    register_pipeline,
)
from omnimoe.zoo.cosmos3.convert import BASE_FPS, COMPRESSION
from omnimoe.zoo.cosmos3.layout import PATCH, Scene, Shape, lay_out, to_latent, to_rows
from omnimoe.zoo.cosmos3.media import CELL, decode_pictures, decode_sound, encode_picture, read_part, sound_length

STEPS, GUIDANCE = 35, 6.0
"""Forwards of a picture or clip and how far it is pushed from what is drawn of the second prompt, as published."""
SIZE, FRAMES = (720, 1280), 189
"""Height and width in pixels, and pictures of a clip, where none are asked for, as published."""
FILES = (
    "*.json",
    "text_tokenizer/*",
    "scheduler/*.json",
    *(f"{part}/*.{kind}" for part in ("vae", "sound_tokenizer") for kind in ("json", "safetensors")),
)
"""What a checkpoint holds beside its model."""
_SYSTEM = "You are a helpful assistant who will generate {kind}s from a give prompt."  # as in training


@register_pipeline("cosmos3")
class Cosmos3(Pipeline):
    """A model with its tokenizer and what turns latents into pictures and sounds.

    Args:
        model: of the family.
        tokenizer: of transformers, with a template of talks.
        pictures: diffusers' ``AutoencoderKLWan``; None for a copy that only answers.
        scheduler: diffusers' scheduler, as published.
        sounds: diffusers' ``Cosmos3AVAEAudioTokenizer``, for sound.
        has_system: put the published sentence in front of a prompt that is drawn.
        has_even_times: take even times in the place of the scheduler's own, as Edge does.
    """

    targets = ("text", "image", "video")

    def __init__(
        self,
        model: OmniMoeForCausalLM,
        tokenizer: Any,
        pictures: Any = None,
        scheduler: Any = None,
        sounds: Any = None,
        *,
        has_system: bool = True,
        has_even_times: bool = False,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.pictures, self.scheduler, self.sounds = pictures, scheduler, sounds
        self.has_system, self.has_even_times = has_system, has_even_times

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Unpack[Loading]) -> Cosmos3:
        """A published checkpoint: a folder, an id on the Hub, or a name of the zoo.

        Args:
            source: as for :func:`omnimoe.from_pretrained`, or a name of the zoo.
            options: those of :class:`~omnimoe.pipelines.base.Loading`; what makes pictures and sounds stays in float32.

        Raises:
            CheckpointError: if a file is missing, malformed, or does not fit.
            ImportError: without diffusers.
        """
        folder, load = open_published(source, FILES, **options)
        tokenizer = read_tokenizer(folder)
        model = load()
        file = folder / "model_index.json"
        settings = read_json(file, CheckpointError) if file.is_file() else {}
        return cls(
            model,
            tokenizer,
            *(read_part(folder, name, model.device) for name in ("vae", "scheduler", "sound_tokenizer")),
            has_system=bool(settings.get("default_use_system_prompt", True)),
            has_even_times=bool(settings.get("use_native_flow_schedule", False)),
        )

    def draw(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        sizes: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        against: str = "",
    ) -> list[np.ndarray]:
        """A picture ``(H, W, 3)`` uint8 for each document of words; see :meth:`film`."""
        made = self.film(
            documents, sizes=sizes, num_frames=1, guidance=guidance, steps=steps, seed=seed, against=against
        )
        return [clip.frames[0] for clip in made]

    def film(
        self,
        documents: Sequence[Sequence[Part] | str],
        *,
        sizes: Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        num_frames: int | None = None,
        fps: float = BASE_FPS,
        sound: bool = False,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        against: str = "",
    ) -> list[Clip]:
        """A clip for each document.

        Args:
            documents: words; or a picture and words, and the clip begins with the picture.
            sizes: height and width in pixels, multiples of 16, one for all or one each; :data:`SIZE` where None.
            num_frames: pictures of a clip, one or four more and so on; others are rounded down to that. :data:`FRAMES`
                where None.
            fps: pictures a second.
            sound: make the sound too, for checkpoints that do.
            guidance: how far it is pushed from what is drawn of ``against``; 1 does without.
            steps: forwards through the model, twice with guidance.
            seed: of the noise; document i has that of ``seed + i``, whatever it is drawn with.
            against: what is not wanted.

        Returns:
            A :class:`Clip` for each.

        Raises:
            ValueError: if the copy cannot do it, or a size or document does not fit.
        """
        num_frames = FRAMES if num_frames is None else num_frames
        if self.pictures is None or self.scheduler is None:
            raise ValueError("this copy has no autoencoder to draw with; load one with vae/ and scheduler/")
        if sound and (self.sounds is None or "sound" not in self.model.config.modality_names):
            raise ValueError("this copy makes no sound; take Nano or Super with their sound_tokenizer/, or sound=False")
        steps, guidance = STEPS if steps is None else steps, GUIDANCE if guidance is None else guidance
        check_whole("num_frames", num_frames)
        check_whole("steps", steps)
        as_guidance(guidance)
        if not isinstance(fps, Real) or not 0 < fps < math.inf:
            raise ValueError(f"fps must be a number above 0, got {fps!r}")
        read = read_documents(documents, lambda picture: whole_pictures([picture])[0])
        asked = [_asked(document, place, num_frames) for place, document in enumerate(read)]
        each, seeds = _each(sizes, len(asked)), document_seeds(seed, len(asked))
        found: list[Clip | None] = [None] * len(asked)
        for size in dict.fromkeys(each):
            mine = [place for place, other in enumerate(each) if other == size]
            made = self._film(
                [asked[place] for place in mine],
                size,
                num_frames=num_frames,
                fps=fps,
                sound=sound,
                guidance=guidance,
                steps=steps,
                seeds=[seeds[place] for place in mine],
                against=against,
            )
            for place, clip in zip(mine, made, strict=True):
                found[place] = clip
        return [clip for clip in found if clip is not None]

    @torch.no_grad()
    def answer(
        self, documents: Sequence[Sequence[Part] | str], *, max_new_tokens: int = 512, **options: Any
    ) -> list[str]:
        """Words for each document.

        Args:
            documents: words and pictures in order, one turn of a talk.
            max_new_tokens: longest answer.
            options: of ``model.generate``: ``do_sample``, ``temperature``, ``num_beams``, ...

        Returns:
            A text for each.
        """
        read = read_documents(documents, lambda picture: whole_pictures([picture])[0])
        config, vision = self.model.config, self.model.model.modalities["vision"]
        encoder, held = vision.get_encoder(), vision.config.placeholder_id
        scenes, patches, grids = [], [], []
        for document in read:
            pictures = [part for part in document if not isinstance(part, str)]
            shapes: list[Shape] = []
            if pictures:
                given = encoder.prepare(pictures)
                patches.append(given["patches"][given["mask"]])
                grids.append(given["grids"])
                shapes = encoder.shapes(given)
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in document
            ]
            ids = self._talk([{"role": "user", "content": content if pictures else "".join(document)}])
            if ids.count(held) != len(shapes):
                raise ValueError(
                    f"the template of the tokenizer gives {ids.count(held)} places for {len(shapes)} pictures; it is "
                    "not the one that was published with the model"
                )
            counts = iter(tall * wide * time for time, tall, wide in shapes)
            scenes.append(
                Scene(ids=[token for one in ids for token in [one] * (next(counts) if one == held else 1)], seen=shapes)
            )
        batch = lay_out(config, scenes, device=self.model.device)
        end = self.tokenizer.eos_token_id
        known = len(self.tokenizer)
        made = self.model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            features={"vision": encoder.pad(torch.cat(patches), torch.cat(grids))} if patches else None,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
            # the table is longer than the tokenizer's list, and a row without a text cannot be told
            suppress_tokens=list(range(known, config.vocab_size)) or None,
            **options,
        )
        new = made[:, batch["input_ids"].shape[1] :].tolist()
        return [self.tokenizer.decode(row[: row.index(end)] if end in row else row) for row in new]

    def _film(
        self,
        asked: list[tuple[str, Image.Image | None]],
        size: tuple[int, int],
        *,
        num_frames: int,
        fps: float,
        sound: bool,
        guidance: float,
        steps: int,
        seeds: list[int | None],
        against: str,
    ) -> list[Clip]:
        tall, wide = size[0] // CELL, size[1] // CELL
        time = (num_frames - 1) // COMPRESSION + 1
        moments = sound_length(self.sounds, num_frames / fps) if sound else 0
        shape = (time, -(-tall // PATCH), -(-wide // PATCH))
        channels = self.model.model.modalities["video"].config.channels // PATCH**2
        clips, noises, firsts = [], [], []
        for (_, picture), seed in zip(asked, seeds, strict=True):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            noise = to_rows(torch.randn(1, channels, time, tall, wide, generator=generator)[0])
            clips.append(
                noise
                if picture is None
                else torch.cat((to_rows(encode_picture(self.pictures, picture, size)), noise[1:]))
            )
            firsts.append(torch.arange(time).view(-1, 1, 1).expand(shape) >= (picture is not None))
            if sound:
                width = self.model.model.modalities["sound"].config.channels
                noises.append(torch.randn(width, moments, generator=generator).T)
        rows = torch.cat([clip.flatten(0, 2) for clip in clips])
        noisy = {"video": torch.cat([first.flatten() for first in firsts])}
        features, noise = {"video": rows}, {"video": rows[noisy["video"]]}
        if sound:
            features["sound"] = noise["sound"] = torch.cat(noises)
            noisy["sound"] = torch.ones(len(noise["sound"]), dtype=torch.bool)
        edge = to_rows(torch.ones(channels, time, tall, wide)).flatten(0, 2) == 0
        beyond = {"video": torch.cat([edge] * len(asked))[noisy["video"]]}
        sides = []
        for is_wanted in (True, False) if guidance != 1 else (True,):
            texts = [words if is_wanted else against for words, _ in asked]
            prompts = [self._prompt(text, size, num_frames, fps, is_wanted=is_wanted) for text in texts]
            scenes = [Scene(ids=ids, video=shape, sound=moments, fps=fps) for ids in prompts]
            sides.append({**lay_out(self.model.config, scenes, device=self.model.device), "features": features})
        sigmas = np.linspace(1 - 1 / self.scheduler.config.num_train_timesteps, 0, steps + 1)[:-1]
        drawn = denoise_jointly(
            self.model,
            sides[0],
            noisy,
            against=sides[1] if len(sides) == 2 else None,
            scale=guidance,
            sampler=SchedulerSampler(self.scheduler, steps, sigmas if self.has_even_times else None),
            noise=noise,
            held=beyond,
        )
        rows = rows.to(drawn["video"])
        rows[noisy["video"].to(rows.device)] = drawn["video"]
        made = []
        for place, part in enumerate(rows.split(torch.Size(shape).numel())):
            frames = decode_pictures(self.pictures, to_latent(part.view(*shape, -1), (tall, wide)))
            if not sound:
                made.append(Clip(frames=frames, fps=fps))
                continue
            heard = decode_sound(self.sounds, drawn["sound"].split(moments)[place])
            rate = int(self.sounds.config.sampling_rate)
            made.append(Clip(frames=frames, fps=fps, sound=heard, sample_rate=rate))
        return made

    def _prompt(self, words: str, size: tuple[int, int], num_frames: int, fps: float, *, is_wanted: bool) -> list[int]:
        """Ids of a prompt with what the model was told of each picture in training, and the token that opens one."""
        kind, no = "image" if num_frames == 1 else "video", "" if is_wanted else "not "
        added = [f"This {kind} is {no}of {size[0]}x{size[1]} resolution."]
        if num_frames > 1:
            added.insert(0, f"The video is {no}{num_frames / fps:.1f} seconds long and is {no}of {fps:.0f} FPS.")
        for sentence in added:
            words = words.rstrip(".")
            words = f"{words}. {sentence}" if words else sentence
        talk = [{"role": "system", "content": _SYSTEM.format(kind=kind)}] if self.has_system else []
        begin = self.model.model.modalities["vision"].config.begin_id
        return [*self._talk([*talk, {"role": "user", "content": words}]), self.tokenizer.eos_token_id, begin]

    def _talk(self, turns: list[dict[str, Any]]) -> list[int]:
        given = self.tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, add_vision_id=False, return_dict=True
        )
        return list(given["input_ids"])


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in ``text_tokenizer/`` of a checkpoint.

    Raises:
        CheckpointError: if there is none.
    """
    from transformers import AutoTokenizer

    place = folder / "text_tokenizer"
    if not (place / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} has no text_tokenizer/, without which no words can be read")
    return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def _asked(document: list[Any], place: int, num_frames: int) -> tuple[str, Image.Image | None]:
    """The words of a document and the picture in front of them."""
    picture = None if isinstance(document[0], str) else document[0]
    words = document[picture is not None :]
    if not all(isinstance(part, str) for part in words) or (picture is not None and num_frames == 1):
        raise ValueError(
            f"document {place} cannot be drawn: pass words alone for a picture, and words or a picture and then words "
            "for a clip"
        )
    return "".join(words), picture


def _each(sizes: Any, count: int) -> list[tuple[int, int]]:
    found = np.asarray(SIZE if sizes is None else sizes)
    if (
        found.dtype.kind not in "iu"
        or found.shape not in ((2,), (count, 2))
        or (found < CELL).any()
        or (found % CELL).any()
    ):
        raise ValueError(
            f"sizes must be (height, width) in pixels, multiples of {CELL}, for all or one for each of {count} "
            f"documents, got {str(sizes)[:60]}"
        )
    pairs = [found.tolist()] * count if found.ndim == 1 else found.tolist()
    return [(tall, wide) for tall, wide in pairs]


__all__ = ["FRAMES", "GUIDANCE", "SIZE", "STEPS", "Cosmos3"]
