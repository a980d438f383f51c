"""Attention implementations of transformers, called with a mask made from our rule.

``"eager"`` and ``"sdpa"`` are ours, since they take the rule as it is. Others (``"flex_attention"``,
``"flash_attention_2"`` and what a user registered) come from transformers' interface, where the model registers
``"xformers"`` as one more.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.layers.attention import Attention, eager, scaled_dot_product
from omnimoe.layers.masks import AttentionMask
from omnimoe.registry import RegistryError


def attention_function(name: str, interface: Callable[[str, Any], Callable | None]) -> Callable:
    """The function that attends, by name.

    Args:
        name: of an attention implementation.
        interface: transformers' look-up, ``(name, default) -> function``.

    Returns:
        ``(module, query (B, H, Q, C), key, value, mask) -> (mixed (B, Q, H, C), weights or None)``.

    Raises:
        ValueError: if no such implementation is there.
    """
    if name == "eager":
        return eager
    if name == "sdpa":
        return scaled_dot_product
    implementation = interface(name, None)
    if implementation is None:
        raise ValueError(f"no attention implementation {name!r}; take 'sdpa', 'eager' or one that transformers lists")
    if "flash" in name:
        return functools.partial(_flash, name, implementation)

    def attend(
        module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, Tensor | None]:
        given: Any = None
        if "flex" in name:
            given = mask.flex()
        elif not mask.needs_no_mask:
            given = mask.additive(query.dtype)
        return implementation(module, query, key, value, given, scaling=module.scaling, dropout=0.0, is_causal=False)

    return attend


def check_attention(name: object, known: Collection[str]) -> None:
    """Refuses an implementation that is not there, when it is chosen and not at the first forward.

    Args:
        name: what was asked for; None for the default.
        known: names that are registered. Others with a slash are kernels of a repository, which transformers fetches.

    Raises:
        RegistryError: if nothing has the name.
        ImportError: if its package is not installed, with the package, and what to take instead.
    """
    if name is None:
        return
    if not isinstance(name, str) or not (name == "eager" or name.removeprefix("paged|") in known or "/" in name):
        # as transformers begins it
        raise RegistryError(
            f'Specified `attn_implementation="{name}"` is not supported; there are eager, {", ".join(sorted(known))}'
        )
    for part, (packages, remedy) in PACKAGES.items():
        if part in name and not any(importlib.util.find_spec(package) for package in packages):
            raise ImportError(
                f"attention implementation {name!r} needs the package {' or '.join(packages)}; {remedy} or take 'sdpa'"
            )


PACKAGES = {
    "xformers": (("xformers",), "install omnimoe[xformers]"),
    "flash_attention": (("flash_attn", "flash_attn_interface", "kernels"), "install one of them"),
}
"""What a name with this in it needs, one of these packages, and where it comes from."""
FLASH_RULES = {"causal": True, "bidirectional": False}
"""The mask rules that flash attention has, and whether it is causal under them."""


def _flash(
    name: str,
    implementation: Callable,
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
) -> tuple[Tensor, Tensor | None]:
    """Flash attention takes no mask, but sequences of any length, one behind the other: documents without padding."""
    is_causal = FLASH_RULES.get(mask.rule)
    if is_causal is None:
        raise ValueError(
            f"{name!r} cannot express the mask rule {mask.rule!r}, only {' and '.join(FLASH_RULES)}; take 'sdpa' or "
            "'flex_attention'"
        )
    is_theirs = "flash_attention" in name or "flash-attn" in name
    if is_theirs and query.device.type == "cpu":
        raise ValueError(f"{name!r} computes on GPUs, and the model is on the CPU; move it to one or take 'sdpa'")
    if is_theirs and query.dtype == torch.float32 and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            f"{name!r} computes in bfloat16 and float16, and the model is in float32; load it with dtype=torch.bfloat16"
        )
    options: dict[str, Any] = {"scaling": module.scaling, "dropout": 0.0, "is_causal": is_causal}
    batch_size, _, length, _ = query.shape
    valid = mask.valid
    if mask.has_unwritten:
        if isinstance(mask.past_length, Tensor):
            raise ValueError(f"{name!r} cannot read a cache of fixed size in a traced graph; take 'sdpa'")
        stop = mask.past_length + length
        key, value = key[:, :, :stop], value[:, :, :stop]
        valid = None if valid is None else valid[:, :stop]
    if key.shape[2] != length or (valid is None and mask.segment_ids is None):
        return implementation(module, query, key, value, valid, **options)
    kept, ends = _documents(valid, mask.segment_ids, batch_size, length, query.device)
    longest = int(ends.diff().max()) if len(kept) else 0
    options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    flat = (part.transpose(1, 2).flatten(0, 1)[kept].transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    mixed, weights = implementation(module, *flat, None, **options)
    spread = mixed.new_zeros(batch_size * length, *mixed.shape[2:]).index_copy(0, kept, mixed.squeeze(0))
    return spread.view(batch_size, length, *mixed.shape[2:]), weights


def _documents(
    valid: Tensor | None, segment_ids: Tensor | None, batch_size: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The positions that are no padding, ``(N,)`` into B·T, and ``(S + 1,)`` int32, where each document starts and ends
    among them."""
    real = torch.ones(batch_size, length, dtype=torch.bool, device=device) if valid is None else valid
    kept = real.reshape(-1).nonzero().squeeze(1)
    documents = torch.zeros_like(real, dtype=torch.int64) if segment_ids is None else segment_ids
    named = torch.stack((kept // length, documents.reshape(-1)[kept]))
    changes = (named[:, 1:] != named[:, :-1]).any(0).nonzero().squeeze(1) + 1
    edges = [changes.new_zeros(1), changes, changes.new_full((1,), len(kept))]
    return kept, torch.cat(edges).to(torch.int32)


def xformers_attention(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """xformers' memory-efficient attention, with the signature of transformers' attention interface.

    Args:
        module: gives the number of queries a key serves.
        query: ``(B, H, Q, C)``.
        key: ``(B, H_kv, K, C)``.
        value: ``(B, H_kv, K, C)``.
        attention_mask: ``(B, 1, Q, K)`` to add to the scores, or None.
        kwargs: ``scaling`` is read.

    Returns:
        ``(B, Q, H, C)`` and None.

    Raises:
        ImportError: if xformers is not installed.
        ValueError: if it has nothing for this device, dtype or width of a head.
    """
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImportError(
            f"attention implementation 'xformers' needs the package xformers ({error}); "
            "install omnimoe[xformers] or take 'sdpa'"
        ) from error
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    bias = None
    if attention_mask is not None:
        # its kernels read the bias in rows whose length is a multiple of eight
        length = attention_mask.shape[-1]
        bias = F.pad(attention_mask, (0, -length % 8)).expand(query.shape[0], query.shape[1], -1, -1)[..., :length]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    try:
        return memory_efficient_attention(query, key, value, attn_bias=bias, scale=kwargs["scaling"]), None
    except NotImplementedError as error:
        raise ValueError(
            f"xformers has no operator for {query.dtype} queries {tuple(query.shape)} on {query.device.type}; see "
            "`python -m xformers.info`, or take 'sdpa'"
        ) from error
