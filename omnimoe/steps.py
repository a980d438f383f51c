"""Generation, as steps of transformers' ``generate``: what goes along with a prompt, and what may follow."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor

from omnimoe.blocks import block_ids_of, block_positions, span_counts
from omnimoe.grids import grid_positions
from omnimoe.inputs import InputError, check_generates, check_prompt, check_routers, repeated
from omnimoe.spans import span_positions, span_processors


class Generates(GenerationMixin):
    """Generation of a model with ``config`` and the stack ``model``."""

    def generate(self, inputs: Any = None, *args: Any, to: str | None = None, **kwargs: Any) -> Any:
        """transformers' ``generate``, from ids to ids; with ``to``, from raw inputs to what is seen or heard.

        Args:
            inputs: ``(B, T)`` ids; with ``to`` a document or several, as :func:`omnimoe.generate` takes them.
            args: of transformers' ``generate``.
            to: a modality, or ``"any"`` to let the model choose, span by span.
            kwargs: of transformers' ``generate``, or of :func:`omnimoe.generate`.

        Returns:
            What transformers' ``generate`` gives; with ``to`` a list of :class:`omnimoe.Generated`, and for ``"any"`` a
            list of such lists, as :func:`omnimoe.interleave`.

        Raises:
            InputError: if a document comes without ``to``.
            GenerationError: with ``to``, as :func:`omnimoe.generate`.

        Example:
            >>> from omnimoe import load
            >>> model = load("omni_nano", pretrained=True)
            >>> (picture,) = model.generate({"text": "red heart"}, to="image", seed=0)
            >>> picture.raw.shape
            (64, 64, 3)
        """
        if to is None:
            if isinstance(inputs, str | Mapping | Sequence):
                known = ", ".join(map(repr, (*self.config.modality_names, "any")))
                raise InputError(
                    f"without to= generate takes ids (B, T), got {type(inputs).__name__}; of a document say what is "
                    f"wanted: to= one of {known}"
                )
            return super().generate(inputs, *args, **kwargs)
        # tokenizers and files are of a tier above the model, which is looked up when it is asked for
        return importlib.import_module("omnimoe.generate").generate(self, inputs, to, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        free: bool = False,
        spans: Sequence[str] | None = None,
        max_span: int | Mapping[str, int] | None = None,
        span_temperature: Mapping[str, float] | None = None,
        span_top_k: Mapping[str, int] | None = None,
        span_top_p: Mapping[str, float] | None = None,
        span_min_p: Mapping[str, float] | None = None,
        guidance: float | Mapping[str, float] | None = None,
        grids: Mapping[str, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``generate`` passes at a step.

        ``free`` to ``grids`` are arguments of ``generate``. It knows them from this signature and hands them to
        ``_get_logits_processor``, where they are used; all but ``grids`` go no further than here.

        Past the prompt, modality ids come from the partition, the key of the last position goes on, and nothing is in a
        block; features enter with the prompt. With ``grids``, the rows and columns of modalities with positions in
        space, rotary positions are read off the ids; without, they go on by one in every axis.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        positions = inputs.get("position_ids")
        if positions is not None and positions.ndim == 3:
            inputs["position_ids"] = positions.movedim(0, -1)
        if inputs.get("input_ids") is None:
            return inputs
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        total = past + inputs["input_ids"].shape[1]
        if grids is not None:
            positions = span_positions(self.config, input_ids, grids, kwargs.get("attention_mask"))
            inputs["position_ids"] = positions[:, past:]
        for name in ("modality_ids", "key_ids", "block_ids"):
            given = inputs.get(name)
            if given is None:
                continue
            new = total - given.shape[1]
            if new > 0:
                tail = given[:, -1:].expand(-1, new)
                if name == "modality_ids":
                    tail = self.model.modality_ids_of(input_ids[:, -new:])
                elif name == "block_ids":
                    tail = torch.full_like(tail, -1)
                given = torch.cat((given, tail), dim=1)
            inputs[name] = given[:, past:total]
        if past and not is_first_iteration:
            inputs.pop("features", None)
            inputs.pop("timesteps", None)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions of the prompt; those of what is generated go on by one."""
        if self.config.positions == "time" or inputs_tensor.ndim != 2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        modality_ids, block_ids = model_kwargs.get("modality_ids"), model_kwargs.get("block_ids")
        length = inputs_tensor.shape[1]
        modality_ids = self.model.modality_ids_of(inputs_tensor) if modality_ids is None else modality_ids
        if self.config.positions == "grids":
            shapes, mask = self.model.shapes_of(model_kwargs.get("features")), model_kwargs.get("attention_mask")
            valid = None if mask is None else mask[:, :length].bool()
            # the steps of transformers append to the last axis, where they expect time
            return grid_positions(self.config, modality_ids[:, :length], shapes, valid).movedim(-1, 0)
        if self.config.positions == "spans":
            mask = model_kwargs.get("attention_mask")
            return span_counts(modality_ids[:, :length], None if mask is None else mask[:, :length].bool())
        if block_ids is None:
            block_ids = block_ids_of(self.config, modality_ids[:, :length], inputs_tensor)
        mask = model_kwargs.get("attention_mask")
        return block_positions(block_ids[:, :length], None if mask is None else mask[:, :length].bool())

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats the prompt for beams and several samples, with its features, of which a prompt may have many."""
        if expand_size > 1:
            kinds, mask = model_kwargs.get("modality_ids"), model_kwargs.get("attention_mask")
            for argument in ("features", "timesteps"):
                for name, rows in (model_kwargs.get(argument) or {}).items():
                    kinds = self.model.modality_ids_of(input_ids) if kinds is None else kinds
                    held = kinds == self.model._modality_id(name)
                    held = held if mask is None else held & mask[:, : held.shape[1]].bool()
                    counts, modality = held.sum(1).tolist(), self.model.modalities[name]
                    own = modality.repeated(rows, counts, expand_size) if argument == "features" else None
                    if own is None:
                        own = repeated(f"{argument}[{name!r}]", rows, counts, expand_size)
                    model_kwargs[argument] = {**model_kwargs[argument], name: own}
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses ``generate_batch`` and its kin, which would wait for ever.

        Raises:
            InputError: always.
        """
        raise InputError(
            "continuous batching keeps keys and values in pages, which this model's attention does not read; pad the "
            "prompts on the left and call generate(input_ids, attention_mask=...)"
        )

    def _validate_generation_mode(self, mode: Any, generation_config: Any, *rest: Any) -> None:
        """Refuses caches by which routers would choose otherwise, and drafts of the first layers: transformers shortens
        the config, from which no layers are read."""
        layers = generation_config.assistant_early_exit
        if layers is not None:
            raise InputError(
                f"assistant_early_exit={layers} would draft with the first layers alone, which this model cannot run; "
                "pass a smaller model as assistant_model="
            )
        check_generates(self.config)
        if not generation_config.use_cache and not all(block.is_causal for block in self.config.blocks):
            raise InputError(
                "without a cache the routers of this model look at other tokens; with one they route each by itself, "
                "which is how it generates; drop use_cache=False"
            )
        if generation_config.cache_implementation == "quantized" and any(block.depth for block in self.config.blocks):
            raise InputError(
                "layers of a mixture of depths mark tokens in their cache, and a quantized one would round that away; "
                "drop cache_implementation='quantized'"
            )
        super()._validate_generation_mode(mode, generation_config, *rest)

    def _prepare_model_inputs(
        self, inputs: Tensor | None, bos_token_id: Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, str | None, dict[str, Any]]:
        """Checks the prompt, since a wrong one would be stretched or cut at the first step without a word."""
        check_generates(self.config)
        check_routers(self)
        prompt, name, rest = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        check_prompt(prompt, rest)
        positions = rest.get("position_ids")
        if positions is not None and positions.ndim == 3:
            # the steps of transformers append to the last axis, where they expect time
            rest = {**rest, "position_ids": positions.movedim(-1, 0)}
        return prompt, name, rest

    def _get_logits_processor(
        self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        """Puts guidance and the grammar of spans first, so that ``top_k`` and the like count what may follow."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        settings = kwargs.get("generation_config") or (args[0] if args else None)
        first = span_processors(self, model_kwargs or {}, use_cache=getattr(settings, "use_cache", True))
        entries = [held for held in self.config.modalities if held.is_input_only]
        barred = [
            token
            for held in entries
            for begin, _, placeholder in held.ids_of_spans
            for token in (placeholder, begin)
            if token is not None
        ]
        if barred:
            # there would be no features for what they open
            first.append(SuppressTokensLogitsProcessor(barred, device=self.device))
        processors[:0] = first
        return processors

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Keeps ``(B, past + T)`` for caches of fixed size too: the mask rule makes the rest."""
        return attention_mask
