"""A published checkpoint, opened: held against its plan before a number is read, then read into a model or a folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from difflib import SequenceMatcher
from functools import cached_property
from os.path import commonpath
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from omnimoe.checkpoint import CheckpointError, complaint
from omnimoe.checkpoint.errors import MisfitError
from omnimoe.checkpoint.fit import bytes_of, check_dtypes
from omnimoe.checkpoint.folder import check_generation
from omnimoe.checkpoint.header import Entry
from omnimoe.checkpoint.memory import check_memory
from omnimoe.convert.absent import remember_start
from omnimoe.convert.converter import Converter
from omnimoe.convert.files import NAMES, Held, Weights, main_dtype
from omnimoe.convert.licence import facts_of, license_facts, tell
from omnimoe.convert.rules import Piece, Plan, Shape
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM

logger = logging.getLogger(__name__)

ROWS = 4096
"""Rows that are compared at a time where a file repeats a tensor, or written where it has one that nothing reads."""


class Published:
    """A folder with a published checkpoint. Use it in a ``with`` statement.

    Args:
        folder: of the checkpoint.
        converter: of its family.
        strict: refuse missing, unexpected and misshapen tensors; otherwise log them, and what is missing is fresh.
        outline: take files without numbers too, for a model on the meta device.

    Raises:
        CheckpointError: if a file is missing or malformed, or the weights do not fit the config.
    """

    def __init__(self, folder: Path, converter: Converter, *, strict: bool = True, outline: bool = False) -> None:
        self.folder, self.converter = folder, converter
        self.config: OmniMoeConfig = converter.read(folder)
        check_generation(folder)
        self.weights = Weights(folder, converter.weight_files, outline=outline)
        self.weights.respell(converter.spellings)
        try:
            self._check(strict)
        except BaseException:
            self.weights.close()
            raise
        card = facts_of(folder) or (license_facts(converter.license) if converter.license else {})
        if card:
            self.config.card = card
        tell(folder, converter.notice)

    def __enter__(self) -> Published:
        return self

    def __exit__(self, *error: object) -> None:
        self.weights.close()

    @cached_property
    def meta(self) -> OmniMoeForCausalLM:
        """The model without memory."""
        with torch.device("meta"):
            return OmniMoeForCausalLM(self.config)

    @cached_property
    def plan(self) -> Plan:
        """Where everything goes."""
        return self.converter.plan(self.meta)

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of most of the file."""
        return main_dtype(self.weights.dtypes, self.weights.shapes)

    def _check(self, strict: bool) -> None:
        self._check_types()
        held, wanted = self.weights.shapes, self.plan.published
        repeated = {name: of for name, of in self.converter.tied(self.config).items() if name in held}
        missing = {name for name in wanted if name not in held}
        groups = {name: self.converter.group(name, wanted) for name in self.converter.optional}
        absent = {name: keys for name, keys in groups.items() if keys and missing.issuperset(keys)}
        left_out = {key for keys in absent.values() for key in keys}
        unknown = [name for name in held if name not in wanted and name not in repeated]
        ignored = {name: why for name in unknown if (why := self.converter.reason_to_ignore(name, self.config))}
        kept = {name: file for name in sorted(ignored) if (file := self.converter.file_to_keep(name)) is not None}
        report: dict[str, Any] = {
            "missing_keys": missing - left_out,
            "unexpected_keys": set(unknown) - set(ignored),
            "mismatched_keys": [
                (name, held[name], wanted[name]) for name in wanted if name in held and held[name] != wanted[name]
            ],
            "error_msgs": self._mixed_types(),
        }
        self.skipped = missing | {name for name, _, _ in report["mismatched_keys"]}
        misfit = complaint(report)
        if misfit:
            told = f"the weights in {self.folder} do not fit its config as a {self.converter.name} model.\n{misfit}"
            torn = [name for name, keys in groups.items() if name not in absent and not missing.isdisjoint(keys)]
            told += likely_cause(report, wanted, held, torn, list(kept))
            if strict:
                raise MisfitError(f"{told}\nstrict=False loads the rest")
            logger.warning("%s\nWhat is missing is fresh.", told)
        for name, keys in absent.items():
            logger.warning(
                "%s has no %s, which it may lack: what its %d tensors give is fresh", self.folder, name, len(keys)
            )
        if absent:
            self.config.published["absent"] = sorted(absent)
        for why in sorted({why for name, why in ignored.items() if name not in kept}):
            count = sum(held == why for held in ignored.values())
            logger.info("%d tensors of %s have no place here: %s", count, self.folder, why)
        if kept:
            self.config.published["kept"] = list(kept)
            counts = Counter(name.removeprefix("model.").partition(".")[0] for name in kept)
            parts = ", ".join(f"{count} of {part}" for part, count in counts.items())
            logger.warning(
                "%s holds %d tensors that are no part of a %s model: %s. A loaded model is without them; a converted "
                "folder has them in %s",
                *(self.folder, len(kept), self.converter.name, parts, ", ".join(sorted({*kept.values()}))),
            )
        for name, of in repeated.items():
            self._check_twin(name, of)
        if repeated:
            self.config.published["repeated"] = sorted(repeated)

    def _mixed_types(self) -> list[str]:
        """Banks whose copies are of several types, of which none could keep its bits."""
        found = []
        for name, pieces in self.plan.by_ours().items():
            kinds = {
                str(self.weights.dtypes[piece.published]) for piece in pieces if piece.published in self.weights.dtypes
            }
            if len(kinds) > 1:
                found.append(f"the copies of {name} are of several types: {', '.join(sorted(kinds))}")
        return found

    def _check_types(self) -> None:
        """Refuses whole numbers that a parameter would be made of: without their scales they mean something else."""
        ours, held = self.meta.state_dict(), self.weights
        kinds = {name: Entry(NAMES[dtype], held.shapes[name], 0) for name, dtype in held.dtypes.items()}
        wanted = {piece.published: ours[piece.ours] for piece in self.plan.pieces}
        check_dtypes(kinds, wanted, remedy="quantised weights are not converted, so take a copy in bfloat16")

    def _check_twin(self, name: str, of: str) -> None:
        """Refuses a repeated tensor that differs from the one it repeats, since only one of them would be kept."""
        shape = self.weights.shapes[name]
        same = of in self.weights.shapes and shape == self.weights.shapes[of]
        for start in range(0, shape[0], ROWS) if same and not self.weights.is_outline else ():
            rows = (slice(start, start + ROWS),)
            same = same and torch.equal(self.weights.read(name, rows), self.weights.read(of, rows))
        if not same:
            raise CheckpointError(
                f"the config of {self.folder} ties {name} to {of}, and the file holds two that differ; set "
                "tie_word_embeddings to false in its config to keep both"
            )

    def parts(self, pieces: list[Piece]) -> Iterator[Tensor]:
        """The numbers of one of our tensors, in the order of its memory."""
        for piece in pieces:
            yield self.read(piece)

    def read(self, piece: Piece) -> Tensor:
        """What a piece holds, in our form."""
        rows = () if piece.rows is None else (slice(*piece.rows),)
        return piece.change.into(self.weights.read(piece.published, rows))

    def load(
        self,
        *,
        dtype: torch.dtype | Literal["auto"] | None = "auto",
        device: torch.device | str | None = None,
        attn_implementation: str | None = None,
        check_size: bool = True,
    ) -> OmniMoeForCausalLM:
        """The model, in evaluation mode, its weights written into place one published tensor at a time.

        Args:
            dtype: of the weights; ``"auto"`` takes that of the file.
            device: where to.
            attn_implementation: as for ``from_pretrained``.
            check_size: refuse a model larger than the memory that is free.
        """
        config = self.config
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        place = torch.device(device) if device is not None else torch.get_default_device()
        kind = dtype if isinstance(dtype, torch.dtype) else self.dtype if dtype else torch.get_default_dtype()
        if check_size and place.type == "cpu":
            check_memory(bytes_of(self.meta, kind, {}), str(self.folder))
        with nullcontext() if self.skipped else no_init_weights(), place:
            model = OmniMoeForCausalLM._from_config(config, dtype=kind)
        model.tie_weights()
        if place.type != "meta":
            held = model.state_dict(keep_vars=True)
            with torch.no_grad():
                for piece in self.plan.pieces:
                    if piece.published not in self.skipped:
                        piece.place(held[piece.ours]).copy_(self.read(piece))
            remember_start(Held(held), self.plan, self.converter, model.config)
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model.eval()


def likely_cause(
    report: dict[str, Any],
    wanted: Mapping[str, Shape],
    held: Mapping[str, Shape],
    torn: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> str:
    """A line on what went wrong, where the keys tell it; else nothing.

    Args:
        report: missing, unexpected and mismatched keys.
        wanted: shape of every name that the plan reads.
        held: shape of every name in the file.
        torn: groups of which some tensors are there, where a file may lack all or none.
        beside: names in the file that are taken for no part of the model, which they are if they are misspelled.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    cause = ""
    packed = (".qweight", ".absmax", "_blocks", "_scale_inv")
    if any("weight_scale" in name or name.endswith(packed) for name in unexpected):
        cause = "the weights are quantised; take a copy in bfloat16"
    elif any("lora_" in name for name in unexpected):
        cause = "the file holds an adapter; merge it into its model first"
    elif missing and (added := _affix([*unexpected, *beside], missing)):
        cause = f"its names carry the prefix {added!r}, as a wrapped model saves them"
    elif missing and (lacking := _affix(missing, [*unexpected, *beside])):
        cause = f"its names lack the prefix {lacking!r}, as a part of a model saves them"
    elif torn and not unexpected:
        cause = f"the file was cut or fetched in part: it may lack the {torn[0]} as a whole, and holds some of it"
    elif report["mismatched_keys"]:
        cause = "config and weights are of models of different sizes"
    elif missing and (renamed := _renamed(missing, unexpected, wanted, held)):
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        cause = f"renamed: {renamed} for {missing[0]}{more}; the shapes are those of what is missing"
    elif unexpected and not missing:
        cause = "the config is of a smaller model, or says less than the weights hold"
    elif missing and not unexpected and ((part := _part(missing, wanted)) or len(missing) * 4 < len(wanted)):
        cause = f"a file of the checkpoint is missing, or it was saved without {part or 'these parts'}"
    return f"\nLikely cause: {cause}." if cause else ""


def _renamed(missing: list[str], unexpected: list[str], wanted: Mapping[str, Shape], held: Mapping[str, Shape]) -> str:
    """What the first of the missing names is called in the file, where each of them has a stranger of its shape there;
    else nothing."""
    if Counter(wanted[name] for name in missing) != Counter(held[name] for name in unexpected):
        return ""
    alike = [name for name in unexpected if held[name] == wanted[missing[0]]]
    return max(alike, key=lambda name: SequenceMatcher(None, name, missing[0], autojunk=False).ratio())


def _part(missing: list[str], wanted: Iterable[str]) -> str:
    """The part of a model that missing names are, and are all of; nothing where they are scattered."""
    part = commonpath([name.replace(".", "/") for name in missing]).replace("/", ".")
    whole = sum(name.startswith(f"{part}.") for name in wanted) if part else 0
    return part if len(missing) == whole > 1 else ""


def _affix(longer: list[str], shorter: list[str]) -> str:
    """What names of the one list carry in front of names of the other."""
    known = set(shorter)
    for name in longer:
        _, dot, rest = name.partition(".")
        while dot:
            if rest in known:
                return name.removesuffix(rest)
            _, dot, rest = rest.partition(".")
    return ""
