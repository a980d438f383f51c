"""Tier 6: the model, as a transformers model. One batch is followed here from ids to losses.

What is unusual: rows are packed and put in key order once (``RowLayout``); modality ids may be left out, since the
partition of the vocabulary gives them; routings, losses and statistics are returned and never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omnimoe.aligned import Aligned, Aligns, Pooled
from omnimoe.attend import attention_function, xformers_attention
from omnimoe.backbone import Backbone, Block
from omnimoe.blocks import block_ids_of, block_positions, span_counts
from omnimoe.experts_interface import experts_function
from omnimoe.grids import grid_positions
from omnimoe.inputs import (
    InputError,
    check_arguments,
    check_batch,
    check_embedded,
    check_features,
    check_ids,
    check_rows,
    newest,
    rotary_positions,
    valid_positions,
)
from omnimoe.layers import KEY_RULES, Asked, Attention, AttentionMask, Head, RowLayout
from omnimoe.layers.attention import scaled_dot_product
from omnimoe.layers.embedding import HeadLayer, LearnedPositions, NormedEmbedding, ScaledEmbedding
from omnimoe.layers.masks import uncached_facts
from omnimoe.layers.uneven import build_norm
from omnimoe.model_config import OmniMoeConfig
from omnimoe.outputs import OmniMoeModelOutput, OmniMoeOutput, as_asked, router_logits_of, selected
from omnimoe.pretrained import Layer, OmniMoePreTrainedModel
from omnimoe.registry import Registry
from omnimoe.routers import Router, Routing, Scorer
from omnimoe.scoring import Scores, aux_loss_of
from omnimoe.steps import Generates

MODELS: Registry[Callable[[], OmniMoeConfig]] = Registry("model")
register_model = MODELS.register
Later = dict[int, list[tuple[Tensor, Tensor]]]
"""Of a layer, the rows to which something is added before it, and what."""


class OmniMoeModel(OmniMoePreTrainedModel):
    """Embeddings, the backbone and the final norm."""

    def __init__(self, config: OmniMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = embedding_of(config)
        self.places = (
            LearnedPositions(config.learned_positions, config.hidden_size, config.position_offset)
            if any(config.learned_positions)
            else None
        )
        self.kinds = nn.Embedding(len(config.modalities), config.hidden_size) if config.modality_rows else None
        self.position_bias = None
        if config.position_bias is not None:
            self.position_bias = config.position_bias.build(
                num_heads=config.num_attention_heads,
                num_layers=config.num_layers,
                num_modalities=len(config.modalities),
            )
        built = [held for held in config.modalities if held.has_weights]
        self.modalities = nn.ModuleDict(
            {held.name: held.build(hidden_size=config.width_of(held.name)) for held in built}
        )
        for modality in self.modalities.values():
            modality.meet(dict(self.modalities.items()))
        shared: dict[str, Any] = {"hidden_size": config.hidden_size, "num_modalities": config.num_keys}
        shared["widths"] = config.widths
        self.backbone = Backbone(config.blocks, **shared, layer=Layer)
        self.norm = build_norm(config.final_norm, **shared)
        self._needs_key_order, self._needs_token_ids = config.needs_key_order, config.needs_token_ids
        self._mixes_rows = config.mixes_rows
        self._attends = False
        for layer in self.backbone.layers:
            if isinstance(layer.self_attn, Attention):
                self._attends = True
                layer.self_attn.config = config  # where attention functions of transformers look for it
        self._keep_in_fp32_modules_strict = {
            name
            for module in self.modules()
            if isinstance(module, Router)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        } | {
            f"scorer.{name}"
            for module in self.modules()
            if isinstance(module, Scorer) and module.keep_float32
            for name, _ in module.named_parameters(recurse=False)
        }
        self.gradient_checkpointing = False
        with torch.device("cpu"):  # before anything is traced, since a graph that adds to it is traced again
            tables = ("modality_of_ids", *(("key_of_markers",) if config.markers == "key" else ()))
            self._tables = {(name, torch.device("cpu")): getattr(config, name)() for name in tables}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def modality_ids_of(self, input_ids: Tensor) -> Tensor:
        """The modality of each id by the partition of the vocabulary, ``(B, T)`` to ``(B, T)`` int64."""
        return self._from_table("modality_of_ids", input_ids)

    def shapes_of(self, features: dict[str, Any] | None) -> dict[str, Tensor]:
        """Rows along time, height and width of the spans of ``features``, ``(S, 3)`` by modality, where they are known.

        Raises:
            InputError: for a modality that there is not, or that is discrete.
        """
        found = {}
        for name, given in (features or {}).items():
            if name not in self.modalities:
                raise InputError(f"features for {name!r}, but the continuous modalities are {list(self.modalities)}")
            shapes = self.modalities[name].shapes_of(given)
            if shapes is not None:
                found[name] = shapes
        return found

    def _from_table(self, name: str, input_ids: Tensor) -> Tensor:
        """What a table of the config over the vocabulary says of each id."""
        place = name, input_ids.device
        if place not in self._tables or len(self._tables[place]) != self.config.vocab_size:
            self._tables[place] = getattr(self.config, name)().to(input_ids.device)
        return self._tables[place][input_ids]

    def forward(
        self,
        input_ids: Tensor | None = None,
        modality_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
        timesteps: dict[str, Tensor] | None = None,
        inputs_embeds: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        hidden_to_keep: int = 0,
        **kwargs: Any,
    ) -> OmniMoeModelOutput:
        """Runs the stack.

        Args:
            input_ids: ``(B, T)`` int64. At positions of a continuous modality any id may stand.
            modality_ids: ``(B, T)`` int64 into ``config.modalities``; by the partition of the vocabulary where None.
            attention_mask: ``(B, T)`` or, with a cache, ``(B, past + T)``: 1 or True for tokens, 0 for padding.
            position_ids: ``(B, T)`` or ``(B, T, A)`` int64 or float32 rotary positions; as ``config.positions`` counts
                where None, from 0 in each segment.
            segment_ids: ``(B, T)`` int64, the document of each position in a packed row, -1 for padding. Documents do
                not see each other.
            key_ids: ``(B, T)`` int64, the key that picks copies; the modality where None.
            block_ids: ``(B, T)`` int64, blocks for the rules that know them, -1 for none, -2 and below for private
                ones; the spans of ``config.bidirectional_modalities`` where None.
            features: rows of each continuous modality, ``(n, C)``, in order of batch and time; or in the form of its
                own that the modality takes.
            timesteps: noise time of those rows, ``(n,)`` in [0, 1].
            inputs_embeds: ``(B, T, D)`` in place of ``input_ids``.
            past_key_values: a transformers cache.
            use_cache: make a cache where none is given.
            output_router_logits: return the raw router logits of each routed layer; ``config.output_router_logits``
                where None.
            output_hidden_states: return what enters each layer, or the numbers of those to return: 0 for the
                embeddings, -1 for what leaves the last; ``config.output_hidden_states`` where None.
            output_attentions: return attention weights, for which ``"sdpa"`` attends as ``"eager"`` does;
                ``config.output_attentions`` where None.
            return_dict: False gives a plain tuple of what is there.
            hidden_to_keep: last hidden states of the last positions only, that many; 0 for all. Of the others a last
                layer without routers makes keys and values alone, where no gradient and nothing else is asked for.
            kwargs: what transformers passes to every model and this one has no use for; anything else is refused.

        Returns:
            :class:`OmniMoeModelOutput`.

        Raises:
            InputError: for inputs of a wrong shape, dtype or range.
        """
        check_arguments(kwargs, self.forward)
        if hidden_to_keep < 0:
            raise InputError(f"hidden_to_keep counts the last positions, got {hidden_to_keep}; pass 0 for all of them")
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        batch_size, length = check_batch(config, input_ids, inputs_embeds, modality_ids, key_ids, segment_ids)
        check_ids("block_ids", block_ids, (batch_size, length), -(2**31), 2**31, "number blocks from 0, -1 is no block")
        device = inputs_embeds.device if input_ids is None else input_ids.device
        is_recomputed = self.gradient_checkpointing and self.training
        if is_recomputed and (use_cache or past_key_values is not None):
            raise InputError("layers that are recomputed in backward would fill a cache twice; pass use_cache=False")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past, Tensor):
            # a cache of fixed size counts on in place, and a traced graph cannot read what it counts
            past = past.clone() if torch.compiler.is_compiling() else int(past)

        if modality_ids is None:
            if input_ids is None and len(config.modalities) > 1:
                raise InputError("inputs_embeds carry no ids to read modalities from; pass modality_ids")
            empty = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
            modality_ids = empty if input_ids is None else self.modality_ids_of(input_ids)
        if key_ids is not None and config.widths:
            raise InputError("towers of this model differ in width, so a row meets that of its modality; drop key_ids")
        is_cached = past_key_values is not None
        valid = valid_positions(attention_mask, segment_ids, batch_size, past, length, is_cached=is_cached)
        if key_ids is None and config.key_rule:
            if not isinstance(past, int) or past:
                raise InputError(
                    f"the key rule {config.key_rule!r} looks at whole sequences, of which a cache keeps no keys; pass "
                    "key_ids"
                )
            key_ids = KEY_RULES.get(config.key_rule)(modality_ids.long(), len(config.modalities), valid, segment_ids)
        if key_ids is None:
            if len(config.keys) > 1:
                raise InputError(f"copies are picked by the keys {config.keys}; pass key_ids")
            key_ids = torch.zeros_like(modality_ids) if config.keys else modality_ids
            if config.markers == "key" and input_ids is not None:
                ends = self._from_table("key_of_markers", input_ids)
                key_ids = torch.where(ends < 0, key_ids, ends)
        modality_ids, key_ids = modality_ids.long(), key_ids.long()
        rows = RowLayout.build(
            key_ids,
            num_keys=config.num_keys,
            modality_ids=modality_ids,
            valid=None if valid is None else newest(valid, past, length),
            sort=self._needs_key_order,
            routes_causally=is_cached,
        )
        if self._needs_token_ids and input_ids is not None:
            rows = replace(rows, token_ids=rows.to_rows(input_ids))
        if self._mixes_rows and segment_ids is not None:
            rows = replace(rows, document_ids=rows.to_rows(segment_ids.unique(return_inverse=True)[1]))
        if block_ids is None and config.bidirectional_modalities:
            noisy = self._noisy(modality_ids, rows, features, timesteps) if config.private_noise else None
            block_ids = block_ids_of(config, modality_ids, input_ids, noisy)
        rows = replace(rows, compute=experts_function(config._experts_implementation))
        attends = config._attn_implementation or "sdpa"
        if output_attentions and attends == "sdpa":
            attends = "eager"
        mask = self._mask(attends, past_key_values, past, length, valid, segment_ids, key_ids, block_ids, device)
        if position_ids is None and config.positions == "blocks" and block_ids is not None:
            if not isinstance(past, int) or past:
                raise InputError(
                    "positions are counted in blocks, of which a cache keeps none; pass position_ids, as generate does"
                )
            position_ids = block_positions(block_ids, valid, segment_ids)
        if position_ids is None and config.positions == "grids":
            if not isinstance(past, int) or past:
                raise InputError(
                    "positions are counted by the shapes of pictures, of which a cache keeps none; pass position_ids, "
                    "as generate does"
                )
            position_ids = grid_positions(config, modality_ids, self.shapes_of(features), valid, segment_ids)
        if position_ids is None and config.positions == "spans":
            if not isinstance(past, int) or past:
                raise InputError(
                    "positions are counted in spans, of which a cache keeps none; pass position_ids, as generate does"
                )
            position_ids = span_counts(modality_ids, valid, segment_ids)
        positions = rotary_positions(position_ids, segment_ids, batch_size, past, length, device)
        if self.position_bias is not None:
            if not isinstance(past, int) or past:
                raise InputError("learned position biases compare whole sequences; pass use_cache=False")
            mask = replace(mask, bias=self.position_bias(modality_ids, positions[..., 0].long(), valid))

        x, later = self._embed(input_ids, inputs_embeds, features, timesteps, rows)
        if self.kinds is not None:
            x = x + self.kinds(rows.modality_ids).to(x.dtype)
        if self.places is not None:
            x = self.places(x, rows, rows.to_rows(positions)[:, 0])
        kept = selected(output_hidden_states, config.num_layers + 1)
        seen: list[Tensor | None] = []
        asked = None
        wants_all = bool(kept or output_router_logits or output_attentions or config.num_layers in later)
        if 0 < hidden_to_keep < length and not wants_all and self._may_leave_out(mask):
            asked = Asked.last(hidden_to_keep, rows, mask, key_ids, modality_ids)

        def observe(x: Tensor) -> Tensor:
            x = entered(x, later, len(seen))
            shown = rows.to_time(x) if len(seen) in kept else None
            seen.append(shown)
            return x if shown is None else rows.to_rows(shown)  # on the way, so that it can have a gradient

        x, routings, attentions = self.backbone(
            x,
            rows,
            mask,
            rows.to_rows(positions),
            past_key_values,
            observe=observe if kept or later else None,
            asked=asked,
        )
        x = entered(x, later, config.num_layers)
        weights = tuple(part for part in attentions if part is not None)
        if output_attentions and not weights and self._attends:
            raise InputError(f"attention {attends!r} gives no weights; call set_attn_implementation('eager') for them")
        read = rows if asked is None else asked.rows
        hidden = read.to_time(self.norm(x, read))
        seen.append(hidden if config.num_layers in kept else None)
        out = OmniMoeModelOutput(
            last_hidden_state=hidden[:, -hidden_to_keep:],
            past_key_values=past_key_values,
            hidden_states=tuple(seen) if kept else None,
            attentions=weights if output_attentions else None,
            router_logits=router_logits_of(rows, routings) if output_router_logits else None,
            routings=tuple(routings),
            rows=rows,
        )
        return as_asked(out, return_dict, config)

    def _may_leave_out(self, mask: AttentionMask) -> bool:
        """Whether the last layer can be spared rows that nobody reads."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not len(self.backbone.layers):
            return False
        return mask.attend is scaled_dot_product and mask.bias is None and self.backbone.layers[-1].takes_asked

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Any,
        features: dict[str, Tensor] | None,
        timesteps: dict[str, Tensor] | None,
        rows: RowLayout,
    ) -> tuple[Tensor, Later]:
        """Rows that enter the first layer, and what is added to some of them before later ones."""
        later: Later = {}
        x = rows.to_rows(inputs_embeds) if input_ids is None else self.embed_tokens(rows.to_rows(input_ids))
        check_rows("features", features, free=self.config.own_form)
        check_rows("timesteps", timesteps)
        unused = sorted(set(timesteps or {}) - set(features or {}))
        if unused:
            raise InputError(f"timesteps for {unused} without features; pass their rows as features[{unused[0]!r}]")
        untouched = {held.name for held in self.config.modalities if not held.is_discrete}
        for name, given in (features or {}).items():
            modality_id, times = self._modality_id(name), (timesteps or {}).get(name)
            is_free = name in self.config.own_form
            index = None if is_free else rows.where(modality_id, len(given) if given.ndim else 0)
            if index is not None:
                check_features(self.config, name, given, len(index), times)
            embedded = self.modalities[name].embed(given, times)
            if index is None:
                index = rows.where(modality_id, len(embedded))
                check_embedded(name, embedded, len(index))
            embedded, *deeper = self.modalities[name].layered(embedded)
            for layer, added in enumerate(deeper, start=1):
                later.setdefault(layer, []).append((index, added))
            if embedded.shape[1] < x.shape[1]:
                embedded = nn.functional.pad(embedded, (0, x.shape[1] - embedded.shape[1]))
            x = x.index_copy(0, index, embedded.to(x.dtype))
            untouched.discard(name)
        for name in sorted(untouched):
            if name in self.config.input_only and input_ids is not None and input_ids.device.type == "cpu":
                check_embedded(name, x[:0], len(rows.where(self._modality_id(name), 0)))
            if not torch.is_grad_enabled():
                continue
            # an absent modality takes part with no rows: its gradients are zero, not missing
            trained = (held for held in self.modalities[name].parameters() if held.requires_grad)
            x = x + 0 * sum((held.sum() for held in trained), x.new_zeros(())).to(x.dtype)
        return x, later

    def _noisy(
        self,
        modality_ids: Tensor,
        rows: RowLayout,
        features: dict[str, Tensor] | None,
        timesteps: dict[str, Tensor] | None,
    ) -> Tensor:
        """``(B, T)`` bool, the positions whose rows carry noise."""
        noisy = torch.zeros_like(modality_ids, dtype=torch.bool)
        for name, times in (timesteps or {}).items():
            held = modality_ids == self._modality_id(name)
            if rows.valid is not None:
                held = held & rows.valid.view_as(held)
            given = (features or {}).get(name)
            each = None if given is None else self.modalities[name].noise_of_rows(given, times)
            if each is not None and len(each) == int(held.sum()):  # what does not fit is refused where it is embedded
                noisy[held] = each.to(noisy.device) > 0
        return noisy

    def _modality_id(self, name: str) -> int:
        if name not in self.config.modality_names:
            raise InputError(f"unknown modality {name!r}; the modalities are {', '.join(self.config.modality_names)}")
        return self.config.modality_names.index(name)

    def _mask(
        self,
        attends: str,
        cache: Any,
        past: int | Tensor,
        length: int,
        valid: Tensor | None,
        segment_ids: Tensor | None,
        key_ids: Tensor,
        block_ids: Tensor | None,
        device: torch.device,
    ) -> AttentionMask:
        config = self.config
        has_past = isinstance(past, Tensor) or past > 0
        if has_past and segment_ids is not None:
            raise InputError("segment_ids pack several documents into a row, which a cache cannot hold; drop one")
        missing = uncached_facts(config.mask) if has_past else ()
        if missing:
            raise InputError(
                f"the mask rule {config.mask!r} has no cached decoding, since it reads {' and '.join(missing)} of "
                "earlier positions, which a cache does not keep; pass use_cache=False"
            )
        key_length = length
        if cache is not None and config.num_layers:
            key_length = cache.get_mask_sizes(length, 0)[0]
            if valid is not None and valid.shape[1] < key_length:
                valid = nn.functional.pad(valid, (0, key_length - valid.shape[1]))
        return AttentionMask(
            rule=config.mask,
            query_length=length,
            key_length=key_length,
            past_length=past,
            device=device,
            valid=valid,
            segment_ids=segment_ids,
            key_ids=key_ids,
            block_ids=block_ids,
            attend=attention_function(attends, ALL_ATTENTION_FUNCTIONS.get_interface),
        )


def embedding_of(config: OmniMoeConfig) -> nn.Embedding:
    """The table that ids look up."""
    shape = config.vocab_size, config.hidden_size
    if config.embedding_norm_eps:
        return NormedEmbedding(*shape, config.embedding_norm_eps)
    return nn.Embedding(*shape) if config.embedding_scale == 1.0 else ScaledEmbedding(*shape, config.embedding_scale)


def entered(x: Tensor, later: Later, layer: int) -> Tensor:
    """Rows ``(N, D)`` as they enter a layer, with what is added to some of them there."""
    for index, added in later.get(layer, ()):
        x = x.index_add(0, index, nn.functional.pad(added, (0, x.shape[1] - added.shape[1])).to(x.dtype))
    return x


class OmniMoeForCausalLM(OmniMoePreTrainedModel, Generates, Aligns, GenerationMixin):
    """The model with its heads: one over the vocabulary, one for each continuous modality."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: OmniMoeConfig) -> None:
        super().__init__(config)
        self.model = OmniMoeModel(config)
        self._is_stateful = config.layer_types is not None  # from a state transformers cannot take tokens back
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.head_layer = HeadLayer(config.hidden_size, config.head_norm_eps) if config.head_norm_eps else None
        self.aligned = Aligned(config) if config.aligned_size else None
        self.pooled = Pooled(config.hidden_size, config.pooled_labels) if config.pooled_labels else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        modality_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        labels: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
        timesteps: dict[str, Tensor] | None = None,
        targets: dict[str, Tensor] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> OmniMoeOutput:
        """Runs the model and, where there is something to predict, scores it.

        Args:
            input_ids: ``(B, T)`` int64; see :meth:`OmniMoeModel.forward` for what is not listed here.
            modality_ids: ``(B, T)`` int64.
            attention_mask: ``(B, T)`` or ``(B, past + T)``.
            position_ids: ``(B, T)`` or ``(B, T, A)``.
            segment_ids: ``(B, T)``.
            key_ids: ``(B, T)``.
            block_ids: ``(B, T)``.
            labels: ``(B, T)`` int64, the ids themselves: the shift to the next token happens here. -100 is ignored, and
                so is padding, what follows padding, and the first token of a segment.
            features: rows of continuous modalities.
            timesteps: their noise times.
            targets: what their heads must give, ``(n, C)``; at time 0, where rows are clean, they count for nothing.
            past_key_values: a cache.
            inputs_embeds: ``(B, T, D)``.
            use_cache: make a cache.
            logits_to_keep: logits of the last positions only, that many; 0 for all; or an index tensor.
            output_router_logits: return the raw router logits of each routed layer.
            output_hidden_states: return what enters each layer, or some of it.
            output_attentions: return attention weights.
            return_dict: False gives a plain tuple of what is there.
            num_items_in_batch: tokens predicted in all micro-batches of a step; the loss is then the part of this one,
                so that the sum over micro-batches is the mean over all their tokens. The Trainer passes it.
            kwargs: ``shift_labels``, ``(B, T)``, what each position predicts, in place of ``labels``: for sequences
                that were cut after the shift. Also what transformers passes to every model and this one has no use for;
                anything else is refused.

        Returns:
            :class:`OmniMoeOutput`.

        Raises:
            InputError: for inputs of a wrong shape, dtype or range.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        check_arguments(kwargs, self.forward)
        is_scored = any(given is not None for given in (labels, shift_labels, targets))
        reads_in = features is None or (isinstance(features, dict) and {*features} <= {*self.config.input_only})
        is_end = isinstance(logits_to_keep, int) and not is_scored and reads_in
        out = self.model(
            input_ids=input_ids,
            modality_ids=modality_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            key_ids=key_ids,
            block_ids=block_ids,
            features=features,
            timesteps=timesteps,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            hidden_to_keep=max(0, logits_to_keep) if is_end else 0,
        )
        hidden, rows = out.last_hidden_state, out.rows
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        seen_by_head = hidden if isinstance(kept, int) else hidden[:, kept]
        logits = self.lm_head(seen_by_head if self.head_layer is None else self.head_layer(seen_by_head))
        predictions = {}
        for name, given in (features or {}).items():
            if name not in self.config.input_only:
                index = rows.where(self.model._modality_id(name), len(given))
                seen = rows.to_rows(hidden)[index][:, : self.config.width_of(name)]
                predictions[name] = self.model.modalities[name].predict(seen, given)
        aux_loss = aux_loss_of(out.routings)
        scores = Scores(self.config, self.model.modality_ids_of)
        if shift_labels is not None:
            scores.add_tokens(logits, shift_labels, segment_ids, rows.valid, name="shift_labels")
        elif labels is not None:
            scores.add_tokens(logits, self._predicted(labels, input_ids, modality_ids), segment_ids, rows.valid)
        has_labels = labels is not None or shift_labels is not None
        check_rows("targets", targets, free=self.config.own_form)
        for name, target in (targets or {}).items():
            if name in self.config.input_only:
                raise InputError(f"targets for {name!r}, which is input only: it has no head")
            if name not in predictions:
                raise InputError(f"targets for {name!r} without features; pass the noisy rows as features[{name!r}]")
            modality = self.model.modalities[name]
            target = modality.rows_of(target).to(predictions[name].device)
            wanted, got = tuple(predictions[name].shape), tuple(target.shape)
            if wanted != got:
                raise InputError(f"targets[{name!r}] must be {wanted}, got {got}; give one for each row of features")
            times = modality.noise_of_rows((features or {})[name], (timesteps or {}).get(name))
            scores.add_rows(name, modality.loss(predictions[name], target), None if times is None else times > 0)
        loss = scores.total(hidden) if has_labels or targets else None
        if loss is not None:
            # a head that is not scored takes part too: its gradients are zero, not missing
            unscored = [rows for name, rows in predictions.items() if name not in (targets or {})]
            unscored += [] if has_labels else [logits[..., :1]]
            unscored += [held for part in (self.aligned, self.pooled) if part is not None for held in part.parameters()]
            loss = loss + sum(0.0 * rows.float().sum() for rows in unscored)
        if loss is not None and aux_loss is not None:
            loss = loss + aux_loss
        if loss is not None and has_labels and num_items_in_batch is not None:
            # where a step has no label at all, every part is 0
            loss = loss * scores.num_tokens / torch.as_tensor(num_items_in_batch).clamp_min(1)
        out = OmniMoeOutput(
            loss=loss,
            logits=logits,
            losses=scores.losses or None,
            counts=scores.counts or None,
            token_losses=scores.token_losses,
            predictions=predictions or None,
            aux_loss=aux_loss,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=out.router_logits,
            routings=out.routings,
            rows=rows,
        )
        return as_asked(out, return_dict, self.config)

    def _predicted(self, labels: Tensor, input_ids: Tensor | None, modality_ids: Tensor | None) -> Tensor:
        """Labels without those at positions of input-only modalities, where any id may stand."""
        if not self.config.input_only:
            return labels
        if modality_ids is None and input_ids is not None:
            modality_ids = self.model.modality_ids_of(input_ids)
        if modality_ids is None or not isinstance(labels, Tensor) or labels.shape != modality_ids.shape:
            return labels  # refused where it is scored
        for name in self.config.input_only:
            labels = labels.masked_fill(modality_ids == self.model._modality_id(name), -100)
        return labels

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the Trainer may weigh micro-batches by tokens; it counts no rows of continuous modalities."""
        return all(held.is_discrete or held.is_input_only for held in self.config.modalities)

    def update_routers(self, routings: tuple[Routing | None, ...]) -> None:
        """Lets routers that adapt outside of the gradient take in a training step; call it after the optimizer's step.

        Args:
            routings: ``out.routings`` of the step.
        """
        for (_, part), routing in zip(self.model.backbone.parts, routings, strict=True):
            if routing is not None:
                part.update(routing)


ALL_ATTENTION_FUNCTIONS.register("xformers", xformers_attention)
AutoConfig.register("omnimoe", OmniMoeConfig, exist_ok=True)
AutoModel.register(OmniMoeConfig, OmniMoeModel, exist_ok=True)
AutoModelForCausalLM.register(OmniMoeConfig, OmniMoeForCausalLM, exist_ok=True)

__all__ = [
    "MODELS",
    "Block",
    "OmniMoeConfig",
    "OmniMoeForCausalLM",
    "OmniMoeModel",
    "OmniMoeModelOutput",
    "OmniMoeOutput",
    "register_model",
]
