"""Key rules: which copies a row meets, where that follows from what else stands in its sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimoe.registry import Registry

KeyRule = Callable[[Tensor, int, Tensor | None, Tensor | None], Tensor]
"""``(modality_ids (B, T), num_modalities, valid (B, T) or None, segment_ids (B, T) or None) -> (B, T)`` int64 keys."""

KEY_RULES: Registry[KeyRule] = Registry("key rule")
_KEYS: dict[KeyRule, int] = {}


def register_key_rule(name: str, *, keys_per_modality: int = 1, exist_ok: bool = False) -> Callable[[KeyRule], KeyRule]:
    """Decorator that files a key rule under ``name``.

    Args:
        name: as configs write it.
        keys_per_modality: the rule needs so many ``keys`` for each modality of a model.
        exist_ok: replace a rule of the same name.

    Raises:
        RegistryError: if the name is malformed or taken.
    """

    def file_under(rule: KeyRule) -> KeyRule:
        KEY_RULES.register(name, exist_ok=exist_ok)(rule)
        _KEYS[rule] = keys_per_modality
        return rule

    return file_under


def keys_of_rule(name: str, num_modalities: int) -> int:
    """How many keys a rule needs in a model of so many modalities."""
    return _KEYS.get(KEY_RULES.get(name), 1) * num_modalities


@register_key_rule("joint", keys_per_modality=2)
def joint(modality_ids: Tensor, num_modalities: int, valid: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """The modality; beside another modality in its document that plus the number of modalities.

    Source: https://arxiv.org/abs/2111.02358.
    """
    held = F.one_hot(modality_ids, num_modalities)
    if valid is not None:
        held = held * valid.unsqueeze(2)
    if segment_ids is None:
        several = (held.sum(1) > 0).sum(1, keepdim=True) > 1
    else:
        same = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
        several = (torch.einsum("bqk,bkm->bqm", same.float(), held.float()) > 0).sum(2) > 1
    return modality_ids + num_modalities * several


__all__ = ["KEY_RULES", "joint", "keys_of_rule", "register_key_rule"]
