"""What the model gives back, and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from omnimoe.layers import RowLayout
from omnimoe.model_config import OmniMoeConfig
from omnimoe.routers import Routing


@dataclass
class OmniMoeModelOutput(ModelOutput):
    """What the stack returns.

    Args:
        last_hidden_state: ``(B, T, D)``, after the final norm; zeros at padding. Of the last positions alone, where
            ``hidden_to_keep`` says how many.
        past_key_values: the cache, if one is in use.
        hidden_states: ``(B, T, D)`` before each layer and after the last, if asked for; None where others were.
        attentions: ``(B, H, T, K)`` of each layer, if asked for and the attention implementation gives them.
        router_logits: ``(N, E)`` float32 of each routed layer, raw, rows in time order.
        routings: the :class:`~omnimoe.routers.Routing` of each layer's experts, None where nothing is routed, and then
            that of each attention that routes; rows as in ``rows``.
        rows: the row layout of this forward.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routings: tuple[Routing | None, ...] | None = None
    rows: RowLayout | None = None


@dataclass
class OmniMoeOutput(ModelOutput):
    """What the model with heads returns.

    Args:
        loss: scalar, if anything was to be predicted: the mean over predicted tokens, weighted by modality, plus the
            weighted mean of each continuous modality, plus ``aux_loss``. 0 where every label is ignored.
        logits: ``(B, T, V)``.
        losses: mean loss of each modality, by what is predicted; 0 where there was nothing.
        counts: how many positions each of ``losses`` is over.
        token_losses: ``(B, T)`` float32, unreduced: the loss of predicting the token at each position, in nats; with
            ``shift_labels`` the loss of what each position predicts.
        predictions: ``(n, C)`` of each continuous modality whose features were given.
        aux_loss: scalar, the balance losses of all routers, times their coefficients, averaged over routed layers.
        past_key_values: as in :class:`OmniMoeModelOutput`, and so the rest.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    counts: dict[str, Tensor] | None = None
    token_losses: Tensor | None = None
    predictions: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routings: tuple[Routing | None, ...] | None = None
    rows: RowLayout | None = None


@dataclass
class OmniMoeClassifierOutput(ModelOutput):
    """What the model with a head over labels returns.

    Args:
        loss: scalar, if there are labels, with ``aux_loss``.
        logits: ``(B, num_labels)``.
        aux_loss: as in :class:`OmniMoeOutput`.
        hidden_states: as in :class:`OmniMoeModelOutput`, and so the rest.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routings: tuple[Routing | None, ...] | None = None
    rows: RowLayout | None = None


def selected(asked: bool | int | Sequence[int], count: int) -> set[int]:
    """The numbers of the hidden states that are asked for, out of ``count``; those from the end are negative."""
    if isinstance(asked, bool) or asked is None:
        return set(range(count)) if asked else set()
    numbers = [asked] if isinstance(asked, int) else asked
    return {number % count for number in numbers if -count <= number < count}


def as_asked(out: ModelOutput, return_dict: bool | None, config: OmniMoeConfig) -> Any:
    is_dict = config.return_dict if return_dict is None else return_dict
    return out if is_dict else out.to_tuple()


def router_logits_of(rows: RowLayout, routings: Sequence[Routing | None]) -> tuple[Tensor, ...]:
    order = slice(None) if rows.time_index is None else rows.time_index.argsort()
    found = []
    for routing in routings:
        if routing is not None and routing.router_logits is not None:
            found.append(routing.router_logits[order])
    return tuple(found)
