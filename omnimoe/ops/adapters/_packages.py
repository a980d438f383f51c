"""Whether other libraries are installed. Nothing is imported, which would take seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch


@torch.compiler.assume_constant_result
def missing_liger() -> str:
    """Why Liger-Kernel's fused experts cannot be used on this machine; empty where they can."""
    found = importlib.util.find_spec("liger_kernel")
    if found is None or not found.submodule_search_locations:
        return "liger-kernel is not installed"
    if not (Path(found.submodule_search_locations[0]) / "ops" / "fused_moe.py").is_file():
        return f"liger-kernel {importlib.metadata.version('liger-kernel')} has no fused experts; 0.8.5 has"
    return absent("triton")


@torch.compiler.assume_constant_result
def missing_grouped_gemm() -> str:
    """Why MegaBlocks' grouped product cannot be used on this machine; empty where it can."""
    return absent("grouped_gemm")


@torch.compiler.assume_constant_result
def missing_megablocks() -> str:
    """Why MegaBlocks' experts cannot be used on this machine; empty where they can."""
    return absent("megablocks", "grouped_gemm")


@torch.compiler.assume_constant_result
def missing_mamba() -> str:
    """Why the scan of mamba_ssm cannot be used on this machine; empty where it can."""
    return absent("mamba_ssm")


def absent(*names: str) -> str:
    """Which of these modules cannot be found; empty where all can."""
    found = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} not installed" if found else ""
