"""Which architectures are compared, and with what."""

from __future__ import annotations

from collections.abc import Sequence

from omnimoe.model import MODELS

ARCHITECTURES: dict[str, str | None] = {
    "dense": None,
    "mot": "dense",
    "mot_text_alone": "dense",
    "mot_image_alone": "dense",
    "mot_speech_alone": "dense",
    "mot_networks": "dense",
    "mot_matrices": "dense",
    "mot_moe": "dense",
    "moma_1t1i1s": "dense",
    "moma_2t2i2s": "dense",
    "moma_4t4i4s": "dense",
    "moma": "dense",
    "moe4x": "dense",
    "moe12x": "dense",
    "moe": "dense",
    "momad_4t4i4s": "dense",
    "mamba": "dense",
    "mixture_of_mamba": "mamba",
}
"""Architecture to the one whose steps it is measured in."""


def resolve_names(names: Sequence[str], size: str) -> list[str]:
    """Zoo names of what a user typed: ``"mot"`` and ``"nano"`` give ``"mot_nano"``; a full name stays as it is.

    ``"all"`` is every architecture of the plan.
    """
    typed = [name for given in names for name in (ARCHITECTURES if given == "all" else (given,))]
    return [f"{name}_{size}" if name not in MODELS and f"{name}_{size}" in MODELS else name for name in typed]


def baselines_of(names: Sequence[str]) -> dict[str, str]:
    """Models that are measured in the steps of another one of ``names`` than the first.

    Example:
        >>> baselines_of(["dense_nano", "mot_nano", "mamba_nano", "mixture_of_mamba_nano"])
        {'mixture_of_mamba_nano': 'mamba_nano'}
    """
    pairs = ((f"{architecture}_", base) for architecture, base in ARCHITECTURES.items() if base is not None)
    found = {}
    for prefix, base in pairs:
        for name in names:
            wanted = f"{base}_{name.removeprefix(prefix)}"
            if name.startswith(prefix) and wanted in names and wanted != names[0]:
                found[name] = wanted
    return found
