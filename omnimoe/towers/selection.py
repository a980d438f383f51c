"""What is kept of a model, and the config of that.

Ids never move: the vocabulary is cut behind the last row that something kept uses, and kept modalities stay where they
are. On rows of what is kept, the smaller model gives what the whole one gives.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from omnimoe.config import ConfigError
from omnimoe.modalities import Tokens
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.towers.cutting import keep_keys


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is kept of a model.

    Args:
        whole: config of the whole model.
        keys: ids of the keys that stay, ascending.
        modalities: ids of the modalities that stay, ascending.
    """

    whole: OmniMoeConfig
    keys: tuple[int, ...]
    modalities: tuple[int, ...]

    @functools.cached_property
    def config(self) -> OmniMoeConfig:
        """The config of what is kept."""
        whole, num_keys = self.whole, self.whole.num_keys
        names = whole.modality_names
        kept = {names[number] for number in self.modalities}
        cut = functools.partial(keep_keys, keys=self.keys, num_keys=num_keys)
        is_alone = len(self.keys) == 1
        config = whole.replace(
            modalities=tuple(self._moved(whole.modalities[number]) for number in self.modalities),
            vocab_size=self.vocab_size,
            learned_positions=tuple(
                whole.learned_positions[number] for number in self.modalities if whole.learned_positions
            ),
            keys=tuple(whole.keys[key] for key in self.keys) if whole.keys else (),
            bidirectional_modalities=tuple(name for name in whole.bidirectional_modalities if name in kept),
            # a rule that compares keys has no cached decoding, and nothing is left to compare
            mask="causal" if is_alone and whole.mask == "one_way" else whole.mask,
            attention=cut(whole.attention),
            experts=cut(whole.experts),
            norm=cut(whole.norm),
            mlp_norm=cut(whole.mlp_norm),
            final_norm=cut(whole.final_norm),
            layers=tuple(cut(held) for held in whole.layers),
        )
        if whole.card is not None:
            config.card = whole.card
        return config

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows of the vocabulary up to the last that something kept uses."""
        owned = torch.isin(self.whole.modality_of_ids(), torch.tensor(self.modalities)).nonzero()
        return max((0, *owned.flatten().tolist(), *self._special)) + 1

    @property
    def silent_ids(self) -> list[int]:
        """Ids of what was left out that are still in the vocabulary: a model without it must not open or write it."""
        owners = self.whole.modality_of_ids(markers="text")
        silent = set((~torch.isin(owners, torch.tensor(self.modalities))).nonzero().flatten().tolist())
        left = (held for number, held in enumerate(self.whole.modalities) if number not in self.modalities)
        silent |= {token for held in left for token in (held.begin_id, held.placeholder_id) if token is not None}
        return sorted(token for token in silent - self._special if token < self.vocab_size)

    def finish(self, model: OmniMoeForCausalLM, folder: Path) -> None:
        """Gives the model the settings of generation that lie in its folder, cut likewise."""
        model.name_or_path = model.config.name_or_path = str(folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        silent = {*self.silent_ids, *(model.generation_config.suppress_tokens or ())}
        if silent:
            model.generation_config.suppress_tokens = sorted(token for token in silent if token < self.vocab_size)

    @functools.cached_property
    def _special(self) -> set[int]:
        whole = self.whole
        ends = whole.eos_token_id if isinstance(whole.eos_token_id, list) else [whole.eos_token_id]
        tokens = [whole.pad_token_id, whole.bos_token_id, *ends]
        for number in self.modalities:
            held = whole.modalities[number]
            tokens += [held.begin_id, held.end_id, held.placeholder_id]
        return {token for token in tokens if token is not None}

    def _moved(self, modality: Any) -> Any:
        """A modality whose ids are where they were, though others before it are gone."""
        if not isinstance(modality, Tokens.Config):
            return modality
        start = self.whole.token_ranges[modality.name].start
        return modality.replace(vocab_start=start, vocab_size=min(modality.vocab_size, self.vocab_size - start))


def select(config: OmniMoeConfig, towers: Iterable[str] | None, without: Iterable[str] = ()) -> Selection | None:
    """What is kept of a model; None where that is all of it.

    Args:
        config: of the whole model.
        towers: names of the keys whose towers stay: the modalities, unless the config has other keys. All where None.
        without: names of modalities or keys that go.

    Raises:
        ConfigError: if a name is unknown, or nothing would be left.
    """
    keys, names = config.keys or config.modality_names, config.modality_names
    towers = keys if towers is None else _listed(towers)
    without = _listed(without)
    for given, known, kind in ((towers, keys, "towers"), (without, {*keys, *names}, "without")):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(
                f"{kind} names {', '.join(map(repr, unknown))}; this model has {', '.join(sorted(known))}"
            )
    kept_keys = tuple(number for number, name in enumerate(keys) if name in towers and name not in without)
    kept = tuple(number for number, name in enumerate(names) if name not in without)
    if not config.keys:
        kept = kept_keys
    if not kept_keys or not kept:
        raise ConfigError(f"nothing is left of a model of {', '.join(keys)} with towers {towers} and without {without}")
    if len(kept_keys) == len(keys) and len(kept) == len(names):
        return None
    if config.widths:
        raise ConfigError("a model whose towers differ in width is not cut; load it whole")
    if config.position_bias is not None or config.key_rule:
        raise ConfigError(
            "a position bias or a key rule looks at all modalities, and such a model is not cut; load it whole"
        )
    return Selection(whole=config, keys=kept_keys, modalities=kept)


def _listed(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
