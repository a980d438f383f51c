"""MegaBlocks' path without blocks: its gather and scatter around two grouped products of ``grouped_gemm``.

What ``dMoE`` with ``mlp_impl="grouped"`` calls. It was written from the published sources and **never run**: MegaBlocks
0.10 asks for PyTorch 2.7 and does not compile against CUDA 13. The number of rows of each group is read by the host,
as MegaBlocks itself does, and bfloat16 is all that ``grouped_gemm`` multiplies.

The other way round needs no MegaBlocks: its call sites run on our kernels through :mod:`omnimoe.ops.gmm`.

Source: https://github.com/databricks/megablocks and https://github.com/tgale96/grouped_gemm.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from omnimoe.ops._backends import BackendError
from omnimoe.ops.adapters._packages import missing_grouped_gemm, missing_megablocks
from omnimoe.ops.adapters._rows import group_of_rows, rows_by_token
from omnimoe.ops.experts_mlp.activations import ACTIVATIONS, GATED


def why_not_product(x: Tensor, *rest: Any) -> str:
    """Why its grouped product cannot; empty where it can."""
    if reason := missing_grouped_gemm():
        return reason
    if x.device.type != "cuda":
        return f"its kernels are for CUDA, and x is on {x.device}"
    if x.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {x.dtype}"
    return "it reads the sizes of groups, which a traced graph cannot do" if torch.compiler.is_compiling() else ""


def why_not_experts(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, offsets: Tensor, *rest: Any) -> str:
    """Why its experts cannot; empty where they can."""
    if reason := missing_megablocks() or why_not_product(x):
        return reason
    return "" if rest and rest[0] is not None else "its gather and scatter are for routed rows"


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`omnimoe.ops.grouped_mm`."""
    sizes = _sizes(offsets)
    end = int(sizes.sum())
    y = _import("grouped_gemm.ops").gmm(x[:end].contiguous(), weight.contiguous(), sizes, trans_b=True)
    if bias is not None:
        y = y + bias[group_of_rows(offsets, end)]
    return torch.cat([y, y.new_zeros(len(x) - end, y.shape[1])])


def experts_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    activation: str,
    token_index: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """See :func:`omnimoe.ops.experts_mlp`.

    Raises:
        BackendError: if tokens have different numbers of experts.
    """
    by_token = rows_by_token(token_index, offsets, len(x))
    if by_token is None:
        raise BackendError("backend 'megablocks' was asked for, but its gather needs as many experts for every token")
    ops, gmm = _import("megablocks.ops"), _import("grouped_gemm.ops").gmm
    order = by_token.reshape(-1)
    # its indices count a token's experts: row r is entry indices[r] of the flattened (T, K)
    indices = torch.empty_like(order, dtype=torch.int32)
    indices[order] = torch.arange(len(order), device=order.device, dtype=torch.int32)
    bins, ids, top_k, sizes = offsets, group_of_rows(offsets, len(order)).int(), by_token.shape[1], _sizes(offsets)
    hidden = gmm(ops.gather(x, indices, ids, bins, top_k), gate_up_proj.contiguous(), sizes, trans_b=True)
    if gate_up_proj.shape[1] == down_proj.shape[-1]:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden = GATED[activation](*hidden.chunk(2, -1))
    y = gmm(hidden.contiguous(), down_proj.contiguous(), sizes, trans_b=True)
    scale = y.new_ones(len(order)) if weights is None else weights[order].to(y.dtype)
    return ops.scatter(y, indices, ids, scale, bins, top_k)


def _sizes(offsets: Tensor) -> Tensor:
    return offsets.diff(prepend=offsets.new_zeros(1)).to("cpu", torch.int64)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"{name} is installed but cannot be imported: {error}") from error
