"""Attention implementations of transformers, called with a mask made from our rule.

``"eager"`` and ``"sdpa"`` are ours, since they take the rule as it is. Others (``"flex_attention"``,
``"flash_attention_2"`` and what a user registered) come from transformers' interface, where the model registers
``"xformers"`` as one more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from omnimoe.layers.attention import Attention, eager, scaled_dot_product
from omnimoe.layers.masks import AttentionMask


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
    is_flash = "flash" in name

    def attend(
        module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, Tensor | None]:
        given: Any = None
        if "flex" in name:
            given = mask.flex()
        elif is_flash and not (mask.is_plain_causal or mask.needs_no_mask):
            raise ValueError(
                f"{name!r} takes no mask, but the rule {mask.rule!r} with padding or packing needs one; take 'sdpa' or "
                "'flex_attention'"
            )
        elif not is_flash and not mask.needs_no_mask:
            given = mask.additive(query.dtype)
        is_causal = is_flash and mask.is_plain_causal
        options = {"scaling": module.scaling, "dropout": 0.0, "is_causal": is_causal}
        return implementation(module, query, key, value, given, **options)

    return attend


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
    return memory_efficient_attention(query, key, value, attn_bias=bias, scale=kwargs["scaling"]), None
