"""A model cut into the stages of a pipeline, for ``torch.distributed.pipelining``.

``config.base_model_pp_plan`` says what is cut: what stands in front of the layers goes to the first stage, what stands
behind them to the last one, and the layers are dealt out in runs. What is unusual: every stage gets the same batch,
since rows are laid out by ids and modalities; only hidden states travel, with what the routers have to balance.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from omnimoe.blocks import block_ids_of
from omnimoe.inputs import InputError
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.parallel import ParallelError
from omnimoe.routers import Routing


class _Through(nn.Module):
    """Stands where a part of another stage would."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class Stage(nn.Module):
    """One stage, which is called as every other one is, with the whole batch.

    Args:
        model: the part of the model that is here, by the names that the whole one has.
        index: the place of this stage, from 0.
        count: the number of stages.
    """

    def __init__(self, model: OmniMoeForCausalLM, index: int, count: int) -> None:
        super().__init__()
        self.model, self.index, self.count = model, index, count

    def forward(
        self,
        x: Tensor | None = None,
        balance: Tensor | None = None,
        *,
        input_ids: Tensor,
        modality_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layers of this stage.

        Args:
            x: ``(B, T, D)``, what the stage before gives; None on the first.
            balance: ``(2,)``, the balance losses of the stages before and the number of layers that have one.
            input_ids: ``(B, T)`` int64.
            modality_ids: ``(B, T)`` int64; by the partition of the vocabulary where None.
            block_ids: ``(B, T)`` int64; as the model makes them where None.
            labels: ``(B, T)`` int64, which the last stage scores.
            inputs: more of what :class:`OmniMoeForCausalLM` takes; the same on every stage.

        Returns:
            ``(B, T, D)`` and the balance so far. The last stage gives ``(B, T, V)`` logits and the loss, ``(1,)``, or
            without labels the balance loss.

        Raises:
            InputError: if a stage behind the first does not get the hidden states of the one before.
        """
        base, config = self.model.model, self.model.config
        given = {**inputs, "modality_ids": modality_ids, "block_ids": block_ids, "use_cache": False}
        if self.index == 0:
            given |= {"input_ids": input_ids}
            balance = torch.zeros(2, device=input_ids.device)
        elif x is None or balance is None:
            raise InputError(f"stage {self.index} of {self.count} got no hidden states; pass what stage before it gave")
        else:
            if modality_ids is None:
                given["modality_ids"] = modality_ids = base.modality_ids_of(input_ids)
            if block_ids is None and config.bidirectional_modalities:
                given["block_ids"] = block_ids_of(config, modality_ids, input_ids)
            given |= {"inputs_embeds": x}
        if self.index < self.count - 1:
            out = base(**given)
            return out.last_hidden_state, balance + _balance(out.routings, balance)
        scored = self.model(**given, labels=labels)
        total, layers = balance + _balance(scored.routings, balance)
        loss = total / layers.clamp_min(1)
        if scored.loss is not None:
            own = 0.0 if scored.aux_loss is None else scored.aux_loss
            loss = scored.loss - own + loss
        return scored.logits, loss.view(1)  # so that schedules can put those of micro-batches together


def _balance(routings: tuple[Routing | None, ...], like: Tensor) -> Tensor:
    """``(2,)``, the sum of the losses of these layers' routers, and how many layers have one."""
    routed = [routing for routing in routings if routing is not None]
    total = sum((loss for routing in routed for loss in routing.losses.values()), start=like.new_zeros(()))
    return torch.stack((total, like.new_full((), len(routed))))


def pipeline_stage(model: OmniMoeForCausalLM, index: int, count: int) -> Stage:
    """Cuts one stage out of a model, which keeps nothing else.

    Args:
        model: the whole model; the parts of other stages are taken out of it.
        index: the stage wanted, from 0.
        count: the number of stages, at most that of the layers.

    Returns:
        The stage. Its parameters have the names they had in the model, so those of all stages make up a checkpoint.

    Raises:
        ParallelError: if the model cannot be cut so; it is then as it was.

    Example:
        >>> import omnimoe
        >>> first = pipeline_stage(omnimoe.load("mot_37m", device="meta"), 0, 2)
        >>> first.model.lm_head is None
        True
    """
    config = model.config
    if not 2 <= count <= config.num_layers or not 0 <= index < count:
        raise ParallelError(
            f"stage {index} of {count} cannot be cut out of {config.num_layers} layers; take 2 to {config.num_layers} "
            "stages, counted from 0"
        )
    continuous = [held.name for held in config.modalities if not held.is_discrete]
    unfit = (
        (config.tie_word_embeddings, "has one table for the first stage and the last; set tie_word_embeddings=False"),
        (continuous, f"has {', '.join(continuous)}, whose features all stages would have to read; take FSDP2"),
        (config.position_bias is not None, "has learned position biases, which all stages would share; take FSDP2"),
        (config.needs_token_ids, "has routers that look at token ids, which go to the first stage alone; take FSDP2"),
    )
    for is_unfit, reason in unfit:
        if is_unfit:
            raise ParallelError(f"a model cannot be cut into {count} stages if it {reason}")
    base, names = model.model, list(config.base_model_pp_plan)
    middle = next(place for place, name in enumerate(names) if isinstance(attrgetter(name)(base), nn.ModuleList))
    if index > 0:
        for name in (*names[:middle], "modalities", "places", "kinds"):
            _replace(base, name, nn.ModuleDict() if name == "modalities" else None)
    layers, own = attrgetter(names[middle])(base), nn.ModuleList()
    for number in range(len(layers) * index // count, len(layers) * (index + 1) // count):
        own.add_module(str(number), layers[number])  # by its number in the whole model
    _replace(base, names[middle], own)
    if index < count - 1:
        for name in names[middle + 1 :]:
            _replace(base, name, _Through())
        model.lm_head = model.head_layer = model.aligned = model.pooled = None  # type: ignore[assignment]
    return Stage(model, index, count)


def _replace(owner: nn.Module, path: str, part: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(attrgetter(parent)(owner) if parent else owner, name, part)
