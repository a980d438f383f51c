"""A model with a head over labels in the place of that over the vocabulary, for fine-tuning: ``num_labels=3``.

It starts from a language model, whose heads are left out and whose stack is kept; the new head is fresh then. What is
classified is the last position of a sequence that is no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from omnimoe.checkpoint import CheckpointError, read_json
from omnimoe.checkpoint.folder import inside
from omnimoe.checkpoint.route import CONFIG_OF_ADAPTERS
from omnimoe.inputs import InputError, check_arguments, check_tensor, is_readable
from omnimoe.model import OmniMoeForCausalLM, OmniMoeModel
from omnimoe.model_config import OmniMoeConfig
from omnimoe.outputs import OmniMoeClassifierOutput, as_asked
from omnimoe.pretrained import OmniMoePreTrainedModel
from omnimoe.scoring import aux_loss_of


class OmniMoeForSequenceClassification(OmniMoePreTrainedModel):
    """The stack with one linear head over ``config.num_labels`` labels."""

    fresh_heads: ClassVar[tuple[str, ...]] = ("score",)

    def __init__(self, config: OmniMoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = OmniMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        modality_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        labels: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
        timesteps: dict[str, Tensor] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> OmniMoeClassifierOutput:
        """Runs the stack and classifies each sequence.

        Args:
            input_ids: ``(B, T)`` int64; see :meth:`OmniMoeModel.forward` for what is not listed here.
            modality_ids: ``(B, T)``.
            attention_mask: ``(B, T)``. Where None, ``config.pad_token_id`` at the end of ``input_ids`` is no position
                to be classified.
            position_ids: ``(B, T)`` or ``(B, T, A)``.
            key_ids: ``(B, T)``.
            block_ids: ``(B, T)``.
            labels: ``(B,)`` int64 labels; ``(B,)`` float for regression, with one label; ``(B, num_labels)`` float of 0
                and 1 for several labels at once. ``config.problem_type`` says which, and is set by the first labels.
            features: rows of continuous modalities.
            timesteps: their noise times.
            inputs_embeds: ``(B, T, D)``.
            use_cache: taken, since tools pass it to any model; no cache is made.
            output_router_logits: return the raw router logits of each routed layer.
            output_hidden_states: return what enters each layer, or some of it.
            output_attentions: return attention weights.
            return_dict: False gives a plain tuple of what is there.
            kwargs: what transformers passes to every model; anything else is refused.

        Returns:
            :class:`OmniMoeClassifierOutput`.

        Raises:
            InputError: for inputs of a wrong shape, dtype or range.
        """
        check_arguments(kwargs, self.forward)
        out = self.model(
            input_ids=input_ids,
            modality_ids=modality_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            key_ids=key_ids,
            block_ids=block_ids,
            features=features,
            timesteps=timesteps,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden, device = out.last_hidden_state, out.last_hidden_state.device
        valid = attention_mask
        if valid is None and input_ids is not None and self.config.pad_token_id is not None:
            valid = input_ids != self.config.pad_token_id
        last = torch.full((len(hidden),), hidden.shape[1] - 1, device=device)
        if valid is not None:
            last = (valid.to(device).bool() * torch.arange(hidden.shape[1], device=device)).argmax(1)
        logits = self.score(hidden[torch.arange(len(hidden), device=device), last])
        loss, aux_loss = None, aux_loss_of(out.routings)
        if labels is not None:
            self._check_labels(labels, len(hidden))
            loss = self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config)
            loss = loss if aux_loss is None else loss + aux_loss
        found = OmniMoeClassifierOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
            routings=out.routings,
            rows=out.rows,
        )
        return as_asked(found, return_dict, self.config)

    def _check_labels(self, labels: Tensor, batch_size: int) -> None:
        form = f"({batch_size},) or, floating point, ({batch_size}, {self.num_labels})"
        check_tensor("labels", labels, form)
        several = labels.is_floating_point() and tuple(labels.shape) == (batch_size, self.num_labels)
        if not several and tuple(labels.shape) != (batch_size,):
            raise InputError(f"labels must be {form}, one for each sequence, got {labels.dtype} {tuple(labels.shape)}")
        if labels.is_floating_point() or not is_readable(labels):
            return
        wrong = labels[(labels < 0) & (labels != -100) | (labels >= self.num_labels)]
        if self.num_labels > 1 and len(wrong):
            raise InputError(
                f"labels holds {int(wrong[0])}, outside [0, {self.num_labels}); load the model with num_labels= of more"
            )


def class_of(folder: Path | None, num_labels: int | None = None) -> type[OmniMoePreTrainedModel]:
    """The class of a model with heads.

    Args:
        folder: of a saved model or of adapters of one; None for a fresh one.
        num_labels: how many labels it is to have; None for as it is.

    Raises:
        CheckpointError: if the folder's config is malformed.
        ValueError: if ``num_labels`` is no such number.
    """
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise ValueError(f"num_labels must be a whole number from 1, got {num_labels!r}")
    is_classifier = num_labels is not None
    held = [name for name in ("config.json", CONFIG_OF_ADAPTERS) if folder is not None and (folder / name).is_file()]
    if folder is not None and held and not is_classifier:
        plain = read_json(inside(folder, held[0]), CheckpointError)
        is_classifier = plain.get("architectures") == [OmniMoeForSequenceClassification.__name__]
        is_classifier |= held[0] == CONFIG_OF_ADAPTERS and plain.get("task_type") == "SEQ_CLS"
    return OmniMoeForSequenceClassification if is_classifier else OmniMoeForCausalLM


AutoModelForSequenceClassification.register(OmniMoeConfig, OmniMoeForSequenceClassification, exist_ok=True)
