"""The vocabulary of the new model: where the seed's rows go, where new ones lie, and how those start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.modalities import Modality, Tokens
from omnimoe.model import OmniMoeConfig
from omnimoe.spans.partition import end_ids
from omnimoe.tokenizers.base import MARKERS
from omnimoe.tokenizers.text import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS

PLACES = ("behind", "front")
Added = Mapping[str, int | Modality.Config] | Iterable[Modality.Config] | Modality.Config


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A partition, and where its rows come from.

    Args:
        modalities: of the new model, those of the seed first.
        rows: ``(V,)`` int64, the row of the seed that each row is, -1 for a new one.
        offset: what is added to an id of the seed.
        special: ``pad_token_id``, ``bos_token_id`` and ``eos_token_id``, where they change.
    """

    modalities: tuple[Modality.Config, ...]
    rows: Tensor
    offset: int = 0
    special: Mapping[str, Any]

    @property
    def num_new(self) -> int:
        """Rows that the seed does not have."""
        return int((self.rows < 0).sum())


def read_modalities(given: Added) -> tuple[Modality.Config, ...]:
    """The modalities that are asked for, ``{"image": 1000}`` or configs.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(given, Modality.Config):
        return (given,)
    if isinstance(given, Mapping):
        items = given.items()
        return tuple(Tokens.Config(name=n, vocab_size=held) if isinstance(held, int) else held for n, held in items)
    held = () if isinstance(given, str) else tuple(given)
    if isinstance(given, str) or not all(isinstance(part, Modality.Config) for part in held):
        raise ConfigError(f"modalities takes configs such as Tokens.Config, or {{'image': 1000}}, got {given!r}")
    return held


def lay_out(seed: OmniMoeConfig, added: tuple[Modality.Config, ...], markers: str = "behind") -> Vocabulary:
    """Places new modalities and their boundary tokens.

    Args:
        seed: the seed's config.
        added: modalities that it lacks; boundary tokens and placeholders that they do not name get rows of their own.
        markers: ``"behind"`` leaves every id of the seed as it is; ``"front"`` puts the sixteen markers of our
            tokenizers in front, so that texts are those of ``hf_text`` and our corpora fit.

    Raises:
        ConfigError: if a modality is there already, or the markers have no place.
    """
    if markers not in PLACES:
        raise ConfigError(f"markers must be 'behind' or 'front', got {markers!r}")
    names = [*seed.modality_names, *(part.name for part in added)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"the new model would have modality {twice[0]!r} twice; the seed has {seed.modality_names}")
    offset = len(SPECIAL_TOKENS) if markers == "front" else 0
    ranges, held = seed.token_ranges, list(seed.modalities)
    held = [_moved(part, offset, ranges[part.name].start if part.name in ranges else None) for part in held]
    text = next((i for i, part in enumerate(held) if isinstance(part, Tokens.Config)), None)
    special: dict[str, Any] = {}
    front = torch.full((offset,), -1)
    if offset:
        if text is None or ranges[held[text].name].start:
            raise ConfigError("markers='front' needs a seed whose text begins at row 0; leave it out")
        held[text] = _grown(held[text], offset, start=0)
        special = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID}
        special["eos_token_id"] = [EOS_ID, *(token + offset for token in end_ids(seed))]
        own = {PAD_ID: seed.pad_token_id, BOS_ID: seed.bos_token_id, EOS_ID: next(iter(end_ids(seed)), None)}
        for row, token in own.items():
            front[row] = -1 if token is None else token
    start = offset + seed.vocab_size
    free = iter(_spare_pairs() if offset else ())
    fresh = []
    taken = 0
    for part in added:
        wanted = [role for role in ("begin_id", "end_id") if getattr(part, role) is None]
        places: dict[str, int] = {}
        if offset:
            pair = _own_pair(part.name) or next(free, None)
            if pair is None:
                raise ConfigError(f"there are no markers left for modality {part.name!r}; name its begin_id and end_id")
            places = {role: pair[("begin_id", "end_id").index(role)] for role in wanted}
            wanted = []
        if not part.is_discrete and part.placeholder_id is None:
            wanted.append("placeholder_id")
        for role in wanted:
            places[role], taken = start + taken, taken + 1
        fresh.append(part.replace(**places))
    if taken and text is not None and ranges[held[text].name].stop == seed.vocab_size:
        held[text] = _grown(held[text], taken)
    first = start + taken
    for i, part in enumerate(fresh):
        if isinstance(part, Tokens.Config):
            if part.vocab_start is not None:
                raise ConfigError(f"rows of {part.name!r} lie behind the seed's; leave vocab_start out")
            fresh[i] = part.replace(vocab_start=first)
            first += part.vocab_size
    rows = torch.cat((front, torch.arange(seed.vocab_size), torch.full((first - start,), -1)))
    return Vocabulary(modalities=(*held, *fresh), rows=rows, offset=offset, special=special)


@torch.no_grad()
def grown_table(table: Tensor, vocabulary: Vocabulary, *, noise: float, generator: torch.Generator) -> Tensor:
    """An embedding or a head with rows for the new vocabulary.

    Args:
        table: ``(V, D)`` of the seed.
        vocabulary: the new one.
        noise: a new row is the mean of the seed's, and this share of their spread times a normal draw.
        generator: of the draws.

    Returns:
        ``(V', D)``; rows of the seed keep their bits.
    """
    rows = vocabulary.rows.to(table.device)
    grown = table[rows.clamp_min(0)].clone()
    count = vocabulary.num_new
    if not count or table.is_meta:
        return grown
    drawn = torch.randn(count, table.shape[1], generator=generator).to(table.device)
    spread, mean = torch.std_mean(table.float(), dim=0)
    grown[rows < 0] = (mean + noise * spread * drawn).to(table.dtype)
    return grown


def _moved(part: Modality.Config, offset: int, start: int | None) -> Modality.Config:
    roles = ("begin_id", "end_id", "placeholder_id")
    changes = {role: getattr(part, role) + offset for role in roles if getattr(part, role) is not None}
    return part.replace(**changes, **({} if start is None else {"vocab_start": start + offset}))


def _grown(part: Modality.Config, count: int, start: int | None = None) -> Modality.Config:
    assert isinstance(part, Tokens.Config)
    return part.replace(vocab_size=part.vocab_size + count, vocab_start=part.vocab_start if start is None else start)


def _own_pair(name: str) -> tuple[int, int] | None:
    """The markers of a modality that our tokenizers know."""
    if name not in MARKERS:
        return None
    begin, end = (SPECIAL_TOKENS.index(marker) for marker in MARKERS[name])
    return begin, end


def _spare_pairs() -> list[tuple[int, int]]:
    spare = [i for i, token in enumerate(SPECIAL_TOKENS) if token.startswith("<reserved")]
    return list(zip(spare[::2], spare[1::2], strict=False))


__all__ = ["Added", "Vocabulary", "grown_table", "lay_out", "read_modalities"]
