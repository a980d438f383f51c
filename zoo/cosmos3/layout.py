"""How a sample of Cosmos3 is laid out: words and pictures that are seen, then all that is generated together.

Positions have three axes. Those of words and of pictures that are seen are those of :mod:`omnimoe.grids`. What is
generated begins a margin after the last word, pictures, sounds and actions at the same place; time runs there by the
clock, so that a place is a latent picture at 24 pictures a second whatever the rate, and lies between whole numbers
where the rate is another. Rows and columns begin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe import InputError, OmniMoeConfig
from omnimoe.grids import grid_positions
from omnimoe.zoo.cosmos3.convert import BASE_FPS, COMPRESSION, MARGIN

Shape = tuple[int, int, int]
"""Of a clip or a picture in rows of the model: along time, height and width."""
PATCH = 2
"""Side of the square of latent cells that a row stands for."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One sample.

    Args:
        ids: words, with the placeholder of the modality at every row of a picture that is seen.
        seen: shapes of those pictures, in order.
        video: shape of the clip that is generated, one latent picture for a still; None for none.
        sound: latent moments of the sound that goes with it.
        action: steps of the machine that go with it.
        fps: pictures a second of the clip, and steps of the machine.
        sound_fps: latent moments a second.
    """

    ids: Sequence[int]
    seen: Sequence[Shape] = ()
    video: Shape | None = None
    sound: int = 0
    action: int = 0
    fps: float = BASE_FPS
    sound_fps: float = 25.0


def lay_out(
    config: OmniMoeConfig, scenes: Sequence[Scene], *, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Samples as columns of a batch, padded in front so that what is generated ends together.

    Args:
        config: of the model.
        scenes: one or more.
        device: where to.

    Returns:
        ``input_ids``, ``modality_ids`` and ``attention_mask (B, T)`` int64, ``position_ids (B, T, 3)`` float32.

    Raises:
        InputError: if a scene has no words, asks for what the model does not make, or its pictures do not fit its ids.
    """
    names = config.modality_names
    ids, kinds, places = [], [], []
    for number, scene in enumerate(scenes):
        if not len(scene.ids):
            raise InputError(f"scene {number} needs words; pass ids, those of an empty prompt too")
        parts = _generated(config, scene, number)
        placeholders = [held.placeholder_id for held in config.modalities]
        kind = config.modality_of_ids()[torch.tensor(scene.ids)]
        seen = {"vision": torch.tensor(scene.seen, dtype=torch.int64).view(-1, 3)}
        known = grid_positions(config, kind.unsqueeze(0), seen)[0].float()
        start = float(known.max()) + 1 + MARGIN
        mine = [kind] + [torch.full((len(at),), names.index(name)) for name, at in parts]
        drawn = [torch.full((len(at),), placeholders[names.index(name)] or 0) for name, at in parts]
        ids.append(torch.cat((torch.tensor(scene.ids), *drawn)))
        kinds.append(torch.cat(mine))
        places.append(torch.cat((known, *(at + torch.tensor([start, 0.0, 0.0]) for _, at in parts))))
    length = max(map(len, ids))
    ahead = [length - len(row) for row in ids]
    return {
        "input_ids": torch.stack([F.pad(row, (gap, 0)) for row, gap in zip(ids, ahead, strict=True)]).to(device),
        "modality_ids": torch.stack([F.pad(row, (gap, 0)) for row, gap in zip(kinds, ahead, strict=True)]).to(device),
        "attention_mask": (torch.arange(length) >= torch.tensor(ahead).unsqueeze(1)).long().to(device),
        "position_ids": torch.stack([F.pad(row, (0, 0, gap, 0)) for row, gap in zip(places, ahead, strict=True)]).to(
            device
        ),
    }


def _generated(config: OmniMoeConfig, scene: Scene, number: int) -> list[tuple[str, Tensor]]:
    """Name and places ``(n, 3)`` of each part that is generated, counted from the margin on."""
    shapes = {
        "video": (scene.video, scene.fps / COMPRESSION, BASE_FPS / COMPRESSION, 0),
        "sound": ((scene.sound, 1, 1) if scene.sound else None, scene.sound_fps, BASE_FPS, 0),
        # a step leads from one picture to the next, so the first belongs to the second
        "action": ((scene.action, 1, 1) if scene.action else None, scene.fps, BASE_FPS / COMPRESSION, 1),
    }
    found = []
    for name, (shape, rate, base, first) in shapes.items():
        if shape is None:
            continue
        if name not in config.modality_names:
            raise InputError(f"scene {number} asks for {name}, and the model makes {', '.join(config.modality_names)}")
        time = torch.arange(shape[0], dtype=torch.float32) + first
        time = time / rate * base if shape[0] > 1 else time
        rows, columns = (torch.arange(side, dtype=torch.float32) for side in shape[1:])
        found.append((name, torch.cartesian_prod(time, rows, columns).view(-1, 3)))
    return found


def to_rows(latent: Tensor) -> Tensor:
    """A latent clip ``(C, T, H, W)`` to rows ``(T, ceil(H / 2), ceil(W / 2), 4 C)``, by row, column and channel."""
    latent = F.pad(latent, (0, -latent.shape[3] % PATCH, 0, -latent.shape[2] % PATCH))
    cells = latent.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (C, T, H, p, W, q)
    return cells.permute(1, 2, 4, 3, 5, 0).flatten(3)


def to_latent(rows: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """Rows ``(T, H, W, 4 C)`` back to a latent clip; ``shape`` is its height and width where they are odd."""
    cells = rows.unflatten(3, (PATCH, PATCH, -1)).permute(5, 0, 1, 3, 2, 4)
    latent = cells.flatten(4).flatten(2, 3)
    return latent if shape is None else latent[:, :, : shape[0], : shape[1]]
