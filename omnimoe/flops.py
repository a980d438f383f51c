"""Counts what a model computes, in closed form from its config.

One multiply-add is 2 FLOP. Matrix products are counted; norms, softmax, rotary turns and activations are not. Attention
scores are counted in full, ``4 * S * D`` a token and layer, under a causal mask too: its saving depends on the kernel.
A backward pass is twice its forward; what a kernel or a checkpoint computes again is not counted. The same conventions
hold for PyTorch's ``FlopCounterMode`` with :func:`formulas`, against which the closed form is tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omnimoe.backbone import Backbone, Block
from omnimoe.config import Config
from omnimoe.layers import Attention, SubNormAttention
from omnimoe.layers.uneven import build_norm
from omnimoe.model_config import OmniMoeConfig
from omnimoe.ops import missing_kernels

if TYPE_CHECKING:
    from omnimoe.model import OmniMoeForCausalLM

KINDS = ("attention_projections", "attention_scores", "experts", "router", "head", "adapters")
"""What :attr:`Flops.by_kind` is split into; ``adapters`` are the linear maps of continuous modalities, in and out."""


class UnknownCostError(TypeError):
    """A part of a model whose config does not say what it costs."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOP of one batch, forward or forward and backward.

    Args:
        total: of the batch.
        tokens: rows without padding.
        by_kind: the total, split into :data:`KINDS`.
        by_modality: the total, split by the modality that caused it; ``"padding"`` for what is computed on padding.
        backward: whether a backward pass is included.
    """

    total: int
    tokens: int
    by_kind: dict[str, int]
    by_modality: dict[str, int]
    backward: bool

    @property
    def per_token(self) -> float:
        """FLOP for each token that is not padding."""
        return self.total / max(1, self.tokens)


def flops(
    model: OmniMoeForCausalLM | OmniMoeConfig,
    batch: Mapping[str, Any] | Tensor | None = None,
    *,
    sequence_length: int | None = None,
    backward: bool = False,
) -> Flops:
    """Counts a forward pass without a cache.

    Experts that choose their tokens are counted at the share that their config gives: the capacity of a batch, rounded
    up, may be up to one token an expert more.

    Args:
        model: a model, or its config; one without a head over the vocabulary is counted without.
        batch: what the model is called with, ``input_ids (B, T)`` or all of the batch: ``modality_ids``,
            ``attention_mask``, ``segment_ids`` and ``features`` are read. None for one sequence whose tokens are spread
            evenly over the modalities.
        sequence_length: length S of that sequence; the longest the model was made for where None.
        backward: count the backward pass too.

    Returns:
        :class:`Flops`.

    Raises:
        ValueError: if both ``batch`` and ``sequence_length`` are given, or the batch has no tokens to count.
        UnknownCostError: if a part of the model does not say what it costs.
    """
    config = model if isinstance(model, OmniMoeConfig) else model.config
    if batch is not None and sequence_length is not None:
        raise ValueError("a batch has its own length; pass either batch or sequence_length")
    if batch is None:
        work = _even(config, config.max_position_embeddings if sequence_length is None else sequence_length)
    else:
        work = _of_batch(config, {"input_ids": batch} if isinstance(batch, Tensor) else batch)

    # a head over labels reads one position of a sequence, which is nothing beside the rest
    outputs = config.vocab_size if isinstance(model, OmniMoeConfig) or hasattr(model, "lm_head") else 0
    table = {kind: dict.fromkeys([*config.modality_names, "padding"], 0.0) for kind in KINDS}
    for modality_id, name in enumerate(config.modality_names):
        rows, width = work.rows[name], config.width_of(name)
        for block in config.blocks:
            share = _share(block)
            kept, length = share * rows, math.ceil(share * work.length)
            matrices, router = _expert_weights(block.experts, width, modality_id)
            router += _attention_router(block.attention, width, modality_id)
            table["attention_projections"][name] += 2 * kept * _projection_weights(block.attention, width, modality_id)
            table["attention_scores"][name] += kept * _score_flops(block.attention, width, length)
            table["experts"][name] += 2 * kept * matrices
            table["router"][name] += 2 * kept * router + 2 * rows * _depth_weights(block, width)
        table["head"][name] = 2 * rows * config.hidden_size * outputs
        table["adapters"][name] = 2 * work.features.get(name, 0) * config.modalities[modality_id].active_params(width)
    padding = work.positions - sum(work.rows.values())
    # where rows are kept by sequence, padding is dropped with the rest
    width = config.hidden_size
    scores = sum(_score_flops(block.attention, width, work.length) for block in config.blocks if block.depth is None)
    table["attention_scores"]["padding"] = padding * scores
    table["head"]["padding"] = 2 * padding * width * outputs

    passes = 3 if backward else 1
    by_kind = {kind: round(passes * sum(row.values())) for kind, row in table.items()}
    by_modality = {name: round(passes * sum(row[name] for row in table.values())) for name in table["head"]}
    return Flops(
        total=sum(by_kind.values()),
        tokens=round(sum(work.rows.values())),
        by_kind=by_kind,
        by_modality=by_modality if by_modality["padding"] else {name: by_modality[name] for name in work.rows},
        backward=backward,
    )


def active_params(config: OmniMoeConfig, modality: str | None = None) -> int:
    """Weights that a token meets: all of them but the copies of other towers and the experts it is not sent to.

    A layer that works on a share of the tokens counts at that share.

    The whole embedding table and head count, as in the size labels of the papers, so a dense model without continuous
    modalities has as many active weights as weights.

    Args:
        config: of the model.
        modality: of the token; None for the mean over modalities.

    Raises:
        ValueError: if there is no such modality.
        UnknownCostError: if a part of the model does not say what it costs.
    """
    if modality is None:
        return round(sum(active_params(config, name) for name in config.modality_names) / len(config.modality_names))
    if modality not in config.modality_names:
        raise ValueError(f"unknown modality {modality!r}; the modalities are {', '.join(config.modality_names)}")
    modality_id, width = config.modality_names.index(modality), config.width_of(modality)
    count = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + width
    count += config.modalities[modality_id].active_params(width)
    count += _beside(config, (config.learned_positions or (0,) * (modality_id + 1))[modality_id], 1)
    count += width * (config.final_norm.form == "layer")
    for block in config.blocks:
        norms = 1 if block.experts.is_absent else 2
        met = norms * width * (1 + bool(block.layer_scale)) + _projection_weights(block.attention, width, modality_id)
        met += _attention_vectors(block.attention, width, modality_id)
        met += _attention_router(block.attention, width, modality_id)
        met += sum(_expert_weights(block.experts, width, modality_id)) + 2 * width * (block.norm.form == "layer")
        count += _share(block) * met + _depth_weights(block, width)
    return round(count)


def total_params(config: OmniMoeConfig) -> int:
    """Weights of the model, tied ones once; counted on the meta device, without memory."""
    shared: dict[str, Any] = {"hidden_size": config.hidden_size, "num_modalities": config.num_keys}
    shared["widths"] = config.widths
    with torch.device("meta"):
        parts: list[nn.Module] = [Backbone(config.blocks, **shared), build_norm(config.final_norm, **shared)]
        if config.position_bias is not None:
            sizes = {"num_heads": config.num_attention_heads, "num_layers": config.num_layers}
            parts.append(config.position_bias.build(**sizes, num_modalities=len(config.modalities)))
        continuous = (held for held in config.modalities if not held.is_discrete)
        parts += [held.build(hidden_size=config.width_of(held.name)) for held in continuous]
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    tables += _beside(config, sum(config.learned_positions), len(config.modalities))
    return tables + sum(parameter.numel() for part in parts for parameter in part.parameters())


def _beside(config: OmniMoeConfig, places: int, maps: int) -> int:
    """Weights of learned positions and rows of modalities, of what stands about the table and before the head, of its
    bias, and of the maps and heads of whole sequences."""
    width, labels = config.hidden_size, config.pooled_labels
    aligned = maps * config.aligned_size * (width + config.aligned_bias) + bool(config.aligned_size)
    rows = places + maps * config.modality_rows + 4 * bool(config.embedding_norm_eps)
    layers = bool(config.head_norm_eps) * (width + 3) * width + bool(labels) * (width + 1) * (width + labels)
    return rows * width + config.head_bias * config.vocab_size + aligned + layers


@dataclass(frozen=True)
class _Work:
    """Rows of each modality without padding, positions with it, the length of a row, rows that come as features."""

    rows: dict[str, float]
    positions: float
    length: int
    features: dict[str, float]


def _even(config: OmniMoeConfig, length: int) -> _Work:
    if length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {length}")
    rows = dict.fromkeys(config.modality_names, length / len(config.modality_names))
    continuous = {modality.name for modality in config.modalities if not modality.is_discrete}
    return _Work(rows, length, length, {name: rows[name] for name in continuous})


def _of_batch(config: OmniMoeConfig, batch: Mapping[str, Any]) -> _Work:
    ids, modality_ids = batch.get("input_ids"), batch.get("modality_ids")
    if modality_ids is None:
        if ids is None:
            raise ValueError(f"a batch needs input_ids or modality_ids to be counted, got {sorted(batch)}")
        modality_ids = config.modality_of_ids().to(ids.device)[ids]
    batch_size, length = modality_ids.shape[:2]
    valid = torch.ones_like(modality_ids, dtype=torch.bool)
    if batch.get("attention_mask") is not None:
        valid &= batch["attention_mask"].bool()
    if batch.get("segment_ids") is not None:
        valid &= batch["segment_ids"] >= 0
    found = torch.bincount(modality_ids[valid], minlength=len(config.modalities)).tolist()
    features = {name: float(len(rows)) for name, rows in (batch.get("features") or {}).items()}
    # what only enters comes in a form of its own; its rows are its positions
    rows = dict(zip(config.modality_names, found, strict=True))
    features |= {name: float(rows[name]) for name in config.input_only if name in features}
    return _Work(rows, batch_size * length, length, features)


def _heads(config: Attention.Config, hidden_size: int) -> tuple[int, int]:
    """Width of all query heads, and of all key heads."""
    head_dim = config.head_dim or hidden_size // config.num_heads
    return config.num_heads * head_dim, (config.num_kv_heads or config.num_heads) * head_dim


def _share(block: Block.Config) -> float:
    """Share of the rows that a layer works on."""
    return 1.0 if block.depth is None else block.depth.capacity


def _depth_weights(block: Block.Config, hidden_size: int) -> int:
    """Weights of what chooses the rows of a layer."""
    return 0 if block.depth is None else block.depth.router_params(hidden_size)


def _copies_met(config: Config, site: str, modality: int) -> float:
    """Copies of a projection that a token meets."""
    if not hasattr(config, "copies_met"):
        return 1.0
    met = config.copies_met(site, modality)
    if met is None:
        raise UnknownCostError(_mixes(config))
    return met


def _mixes(config: Any) -> str:
    return (
        f"{type(config.router).__qualname__} mixes rows, and what its slots cost a token depends on how many tokens "
        f"share them, so FLOPs and active weights of {type(config).__qualname__} are not known"
    )


def _projection_weights(config: Config, hidden_size: int, modality: int) -> float:
    if not hasattr(config, "site_params"):
        return _ask(config, "projection_params")(hidden_size)
    sites = config.site_params(hidden_size)
    return sum(count * _copies_met(config, site, modality) for site, count in sites.items())


def _score_flops(config: Config, hidden_size: int, length: int) -> float:
    if isinstance(config, Attention.Config) and not hasattr(config, "mixing_flops"):
        return 4 * length * _heads(config, hidden_size)[0] * config.head_copies
    return _ask(config, "mixing_flops")(hidden_size, length)


def _attention_router(config: Any, hidden_size: int, modality: int) -> int:
    """Weights of the router of attention, where it has one."""
    router = getattr(config, "router", None)
    if router is None:
        return 0
    gate = hidden_size * (config.shared_gate == "sigmoid")
    return gate + router.router_params(hidden_size, config.num_scored_experts, modality)


def _attention_vectors(config: Config, hidden_size: int, modality: int) -> float:
    """Weights of attention outside of its matrices: biases and q/k norms."""
    if not isinstance(config, Attention.Config) or hasattr(config, "vector_params"):
        return config.vector_params(hidden_size) if hasattr(config, "vector_params") else 0
    heads, kv_heads = _heads(config, hidden_size)
    query, key, value, out = (_copies_met(config, site, modality) for site in ("q_proj", "k_proj", "v_proj", "o_proj"))
    count = (heads * query + (value + key * config.key_bias) * kv_heads) * config.bias
    count += hidden_size * config.output_bias * out
    if config.qk_norm == "rms":
        count += 2 * heads // config.num_heads
    elif config.qk_norm == "rms_joint":
        count += heads + kv_heads
    elif config.qk_norm == "layer":
        count += 2 * (heads + kv_heads)
    return count + 2 * heads * isinstance(config, SubNormAttention.Config)


def _expert_weights(config: Any, hidden_size: int, modality: int) -> tuple[float, float]:
    """Weights that a row of a modality meets on average, of experts and of their router."""
    met = _ask(config, "active_params")(hidden_size, modality)
    router = getattr(config, "router", None)
    if met is None and router is not None and router.mixes_rows:
        raise UnknownCostError(_mixes(config))
    if met is None:
        raise UnknownCostError(f"{type(config).__qualname__} does not say what it costs; give it active_params")
    if router is None:
        return met, 0
    scored = getattr(config, "num_scored_experts", config.num_experts)
    routing = router.router_params(hidden_size, scored, modality)
    return met - routing, routing


def _ask(config: Config, method: str) -> Any:
    if not hasattr(config, method):
        raise UnknownCostError(
            f"{type(config).__qualname__} does not say what it costs; give it {method}(hidden_size, ...)"
        )
    return getattr(config, method)


def _attention_formula(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, length, head_dim = query
    return 2 * batch * heads * length * key[2] * (head_dim + value[3])


def _attention_backward_formula(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention_formula(query, key, value)


def _grouped_formula(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """``(R, D) x (G, D, F)``, or ``(D, R) x (R, F)`` summed inside groups."""
    return 2 * left[-2] * left[-1] * right[-1]


def _compiled_formula(
    x: Any, weight: Any, offsets: Any, bias: Any = None, index: Any = None, *args: Any, **kwargs: Any
) -> int:
    return 2 * (index or x)[0] * weight[1] * weight[2]


def _wgrad_formula(grad: Any, x: Any, offsets: Any, grad_index: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * (grad_index or grad)[0] * grad[1] * x[1]


def _experts_formula(x: Any, into: Any, out: Any, offsets: Any, token_index: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * (token_index or x)[0] * (into[1] * into[2] + out[1] * out[2])


def _experts_backward_formula(grad: Any, x: Any, kept: Any, into: Any, out: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _experts_formula(kept, into, out, None, None)


def _scan_formula(x: Any, step: Any, rate: Any, *args: Any, **kwargs: Any) -> int:
    return 6 * math.prod(x) * rate[1]


def _scan_backward_formula(grad: Any, grad_last: Any, x: Any, step: Any, rate: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _scan_formula(x, step, rate)


def formulas() -> dict[Any, Any]:
    """What ``FlopCounterMode`` does not know, or counts with what is recomputed: op to formula.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.get_total_flops()
        48
    """
    aten, ours = torch.ops.aten, torch.ops.omnimoe
    found = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_formula,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_formula,
        aten._scaled_dot_product_flash_attention_backward: _attention_backward_formula,
        aten._scaled_dot_product_efficient_attention_backward: _attention_backward_formula,
        aten._scaled_dot_product_cudnn_attention_backward: _attention_backward_formula,
        aten._grouped_mm: _grouped_formula,
        ours.chunked_scan: _scan_formula,
        ours.chunked_scan_backward: _scan_backward_formula,
    }
    if not missing_kernels():
        found |= {
            ours.grouped_mm: _compiled_formula,
            ours.grouped_wgrad: _wgrad_formula,
            ours.experts_mlp: _experts_formula,
            ours.experts_mlp_backward: _experts_backward_formula,
            ours.attend: _attention_formula,
            ours.attend_backward: _attention_backward_formula,
            ours.selective_scan: _scan_formula,
            ours.selective_scan_backward: _scan_backward_formula,
        }
    return found
