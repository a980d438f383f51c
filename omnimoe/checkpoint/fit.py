"""Whether weights fit a model, told from what their headers declare, before memory is taken."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from omnimoe.checkpoint.errors import MisfitError
from omnimoe.checkpoint.header import Entry
from omnimoe.checkpoint.report import complaint

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""Dtypes that are cast into each other; F4 and F8_E8M0 mean something to a quantiser alone."""


def layers_in(entries: Collection[str], stack: str) -> int:
    """How many layers of a stack weights are of: one more than the highest number."""
    pattern = re.compile(rf"(?:^|\.){stack}\.layers\.(\d{{1,9}})\.")
    return max((int(found[1]) for found in map(pattern.search, entries) if found), default=-1) + 1


def renamed(entries: Mapping[str, Entry], wanted: Collection[str], prefix: str) -> dict[str, Entry]:
    """Weights under the names of a model that is the base of the saved one, or has it as its base.

    What the saved one has on top of its base is left out for the base.

    Args:
        entries: as declared.
        wanted: names in the model.
        prefix: name of the base in the model with heads.
    """
    start = f"{prefix}."
    has, wants = (any(name.startswith(start) for name in names) for names in (entries, wanted))
    if has and not wants:
        return {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
    if wants and not has:
        return {name if name in wanted else start + name: entry for name, entry in entries.items()}
    return dict(entries)


def misfits(
    entries: Mapping[str, Entry],
    wanted: Mapping[str, Tensor],
    tied: Mapping[str, str] | None = None,
    beside: Collection[str] = (),
) -> str:
    """What does not fit between weights and a model, in words; empty where all does.

    Args:
        entries: as declared, under the model's names.
        wanted: the model's weights, which may be on the meta device.
        tied: weights that are another's, by name; one of the two is enough.
        beside: names of modules whose weights a file may hold under other names, which are not looked at.
    """
    starts = tuple(f"{name}." for name in beside)
    entries = {name: entry for name, entry in entries.items() if not name.startswith(starts)}
    sizes = {name: tuple(held.shape) for name, held in wanted.items() if not name.startswith(starts)}
    missing = {name for name in sizes if name not in entries}
    for name, other in (tied or {}).items():
        if name in entries or other in entries:
            missing -= {name, other}
    shapes = [(name, entries[name].shape, sizes[name]) for name in sizes if name in entries]
    return complaint(
        {
            "missing_keys": missing,
            "unexpected_keys": set(entries) - set(sizes),
            "mismatched_keys": [row for row in shapes if row[1] != row[2]],
        }
    )


def check_dtypes(
    entries: Mapping[str, Entry],
    wanted: Mapping[str, Tensor],
    *,
    remedy: str = "quantised weights need their quantization_config in config.json",
) -> None:
    """Refuses whole numbers where a model has fractions, and the other way round; floating kinds are cast.

    Args:
        entries: as declared, under the model's names.
        wanted: the model's weights.
        remedy: what to do about weights that were quantised.

    Raises:
        MisfitError: naming what cannot be cast.
    """
    odd = [
        f"{name}: {entry.dtype} in the file, {str(wanted[name].dtype).removeprefix('torch.')} in the model"
        for name, entry in sorted(entries.items())
        if name in wanted and (entry.dtype in FLOATS) != wanted[name].dtype.is_floating_point
    ]
    if odd:
        more = f"\n  and {len(odd) - 10} more" if len(odd) > 10 else ""
        listed = "\n  ".join(odd[:10])
        raise MisfitError(
            f"{len(odd)} weights have a dtype that is not cast:\n  {listed}{more}\n{remedy}; others were saved by "
            "mistake"
        )


def bytes_of(model: nn.Module, dtype: torch.dtype | None, entries: Mapping[str, Entry]) -> int:
    """What the weights of a model take in memory.

    Args:
        model: may be on the meta device.
        dtype: of its floating weights; that of the file where None.
        entries: as declared, under the model's names.
    """
    total = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        entry = entries.get(name)
        if dtype is not None and tensor.is_floating_point():
            width = dtype.itemsize
        else:
            width = entry.size // tensor.numel() if entry is not None and tensor.numel() else tensor.element_size()
        total += tensor.numel() * max(1, width)
    return total
