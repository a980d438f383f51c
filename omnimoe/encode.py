"""Features of inputs of one modality: what a model makes of a text, a picture or a clip by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from omnimoe.inputs import InputError, check_tensor, is_readable
from omnimoe.model_config import OmniMoeConfig

_POOLS = (None, "mean", "last")


class Encodes(PreTrainedModel):
    """``encode`` of a model with ``config`` whose stack is its ``base_model``."""

    config: OmniMoeConfig

    def encode(
        self,
        modality: str,
        x: Any,
        *,
        layer: int = -1,
        pool: str | None = None,
        key: str | None = None,
        attention_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Hidden states of inputs of one modality.

        Args:
            modality: its name.
            x: of a discrete modality ids of the whole vocabulary, ``(B, T)`` or ``(T,)``; of a continuous one its rows,
                ``(B, T, C)`` or ``(T, C)``; of one whose features have a form of their own these, each span a sequence.
            layer: number of the hidden states: 0 for what enters the first layer, -1 for what leaves the last, after
                the norm.
            pool: ``"mean"`` of the positions that are no padding or the ``"last"`` of them; all of them where None.
            key: the key of the inputs, in a model whose copies are picked by other keys than the modality; where its
                config has a key rule, None leaves them to that.
            attention_mask: ``(B, T)``, 0 for padding.
            inputs: other arguments of ``forward``: ``position_ids``, ``block_ids``.

        Returns:
            ``(B, T, D)``, zeros at padding in the last; with ``pool`` ``(B, D)``.

        Raises:
            InputError: if the modality or the key is unknown, or ``x`` is not of that modality.
        """
        config, depth = self.config, self.config.num_layers
        if modality not in config.modality_names:
            raise InputError(f"unknown modality {modality!r}; the modalities are {', '.join(config.modality_names)}")
        if not -depth - 1 <= layer <= depth:
            raise InputError(f"layer {layer} is none of the hidden states 0 to {depth}; -1 is the last")
        if pool not in _POOLS:
            raise InputError(f"pool must be 'mean', 'last' or None, got {pool!r}")
        if modality in config.own_form:
            if attention_mask is not None:
                raise InputError(f"features of {modality!r} say themselves how long they are; drop attention_mask")
            given, attention_mask = self._spans(modality, x)
        elif modality in config.token_ranges:
            given = {"input_ids": self._ids(modality, x, attention_mask)}
        else:
            given = self._rows(modality, x, attention_mask)
        shape = next(iter(given.values())).shape[:2]
        if key is not None or (config.keys and not config.key_rule):
            if key not in config.keys:
                known = f"are picked by {', '.join(config.keys)}" if config.keys else "are those of its modalities"
                raise InputError(f"key {key!r} is none of this model, whose copies {known}")
            given["key_ids"] = torch.full(shape, config.keys.index(key), device=self.device)
        kept = None if layer == -1 else [layer]
        out = self.base_model(**given, attention_mask=attention_mask, output_hidden_states=kept, **inputs)
        hidden = out.last_hidden_state if kept is None else out.hidden_states[layer]
        if pool is None:
            return hidden
        valid = torch.ones(shape, device=hidden.device) if attention_mask is None else attention_mask.to(hidden.device)
        if pool == "last":
            last = (valid.bool() * torch.arange(shape[1], device=hidden.device)).argmax(1)
            return hidden[torch.arange(shape[0], device=hidden.device), last]
        shares = valid.bool() / valid.bool().sum(1, keepdim=True).clamp_min(1)
        return torch.einsum("btd,bt->bd", hidden, shares.to(hidden.dtype))

    def _ids(self, modality: str, x: Any, attention_mask: Tensor | None) -> Tensor:
        check_tensor("x", x, "(B, T)")
        ids = x[None] if x.ndim == 1 else x
        held = next(part for part in self.config.modalities if part.name == modality)
        own = self.config.token_ranges[modality]
        inside = (ids >= own.start) & (ids < own.stop)
        for marker in (held.begin_id, held.end_id):
            inside = inside if marker is None else inside | (ids == marker)
        if attention_mask is not None and attention_mask.shape == ids.shape:
            inside = inside | ~attention_mask.bool()
        if is_readable(inside) and not bool(inside.all()):
            raise InputError(
                f"x holds {int(ids[~inside][0])}, and the ids of {modality!r} are {own.start} to {own.stop - 1}; add "
                f"config.token_ranges[{modality!r}].start to codes of a tokenizer"
            )
        return ids

    def _rows(self, modality: str, x: Any, attention_mask: Tensor | None) -> dict[str, Any]:
        check_tensor("x", x, "(B, T, C)")
        rows = x[None] if x.ndim == 2 else x
        if rows.ndim != 3:
            raise InputError(f"rows of {modality!r} must be (B, T, C) or (T, C), got {tuple(x.shape)}")
        place = self.config.modality_names.index(modality)
        holder = self.config.modalities[place].placeholder_id or 0
        shape, device = rows.shape[:2], rows.device
        is_row = torch.ones(shape, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
        return {
            "input_ids": torch.full(shape, holder, device=device),
            "modality_ids": torch.full(shape, place, device=device),
            "features": {modality: rows[is_row]},
        }

    def _spans(self, modality: str, x: Any) -> tuple[dict[str, Any], Tensor | None]:
        """The rows that features of a form of their own become, a sequence for each span, and which are padding."""
        part = self.base_model.modalities[modality]
        embedded, *deeper = part.layered(part.embed(x))
        counts = part.row_counts(x) if hasattr(part, "row_counts") else [len(embedded)]
        spans = pad_sequence(list(embedded.split(counts)), batch_first=True).to(self.dtype)
        place = self.config.modality_names.index(modality)
        lengths = torch.tensor(counts, device=spans.device)
        valid = torch.arange(spans.shape[1], device=spans.device) < lengths[:, None]
        kinds = torch.full(spans.shape[:2], place, device=spans.device)
        given: dict[str, Any] = {"inputs_embeds": spans, "modality_ids": kinds}
        if deeper or (self.config.positions == "grids" and part.shapes_of(x) is not None):
            # embeddings alone do not tell what enters later layers, nor where rows stand
            holder = self.config.modalities[place].placeholder_id or 0
            given = {"input_ids": torch.full_like(kinds, holder), "modality_ids": kinds, "features": {modality: x}}
        return given, None if len(set(counts)) == 1 else valid
