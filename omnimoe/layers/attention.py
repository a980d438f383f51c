"""Attention whose projections are banks. The attention operation itself never looks at banks.

Queries, keys and values are projected by copy on contiguous slices, then put in time order for one attention over the
whole sequence, and the result goes back to rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError, Configurable, register
from omnimoe.layers.bank import TowerMap, resolve_towers
from omnimoe.layers.masks import AttentionMask
from omnimoe.layers.norm import BankHeadLayerNorm, BankJointRMSNorm, BankRMSNorm
from omnimoe.layers.position_bias import BiasedMask
from omnimoe.layers.rope import Rope, rope
from omnimoe.layers.rows import RowLayout
from omnimoe.layers.uneven import Width, copy_widths, linear_bank
from omnimoe.ops import attend, missing_kernels
from omnimoe.ops.attend.fused import for_each_query
from omnimoe.registry import Registry

ATTENTIONS: Registry = Registry("attention")

QK_NORMS = ("none", "rms", "rms_joint", "layer")
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "qk_norm")


def register_attention(name: str, *, exist_ok: bool = False):
    """Decorator that files an :class:`Attention` class under ``name``."""
    return register(ATTENTIONS, name, exist_ok=exist_ok)


class BaseAttention(nn.Module, Configurable):
    """What a block calls to mix positions.

    Contract: ``__init__(config, *, hidden_size, num_modalities, layer_idx)`` and
    ``forward(x (N, D), rows, mask, cache) -> (N, D)``, or that and the attention weights, or these two and a routing
    where :attr:`routes` says so. ``num_modalities`` is the number of keys a row may have: the modalities, unless the
    model is given other ``keys``. A part with rotary positions says so in :meth:`rotary`.
    """

    registry: ClassVar[Registry] = ATTENTIONS
    routes: ClassVar[bool] = False
    """Whether it has experts and gives their routing; then ``update(routing)`` takes in a training step."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """Nothing to choose."""

        @property
        def needs_key_order(self) -> bool:
            """Whether rows must come in key order."""
            return True

        @property
        def is_causal(self) -> bool:
            """Whether a row's routing depends on that row alone; the mask has a say of its own."""
            return True

        @property
        def has_causal_form(self) -> bool:
            """Whether that can be asked for, ``rows.routes_causally``, as generation does."""
            return self.is_causal

        @property
        def num_token_ids(self) -> int:
            """Token ids that it can look up, where it reads ``rows.token_ids``; 0 where it does not."""
            return 0

        @property
        def tp_plan(self) -> dict[str, str]:
            """How tensor parallelism splits the parts inside, name to style; what is not named lies on every rank."""
            return {}

        @property
        def cache_type(self) -> str:
            """What a cache keeps of the layer, as transformers names it: ``"hybrid"`` where that is a state."""
            return "full_attention"

        def check_mask(self, rule: str, hides_blocks: bool) -> None:
            """Refuses a mask rule that the part cannot follow, by name, and whether blocks may be private.

            Raises:
                ConfigError: with the rule and what to do.
            """

    def rotary(self) -> tuple[Rope.Config, int] | None:
        """The rotary positions and the head dimension whose table ``rows.cos`` and ``rows.sin`` are to hold.

        Returns:
            None, the default, for a part that turns nothing; then ``rows`` carry no table.
        """
        return None


@register_attention("attention")
class Attention(BaseAttention):
    """Grouped-query attention with rotary positions, q/k norms and a tower map a site."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseAttention.Config):
        """Grouped-query attention."""

        num_heads: int = 8
        """Query heads."""
        num_kv_heads: int | None = None
        """Key and value heads; as many as query heads where None."""
        head_dim: int | None = None
        """Width of a head; hidden_size / num_heads where None."""
        bias: bool = False
        """Biases on q, k and v."""
        key_bias: bool = True
        """Of them also the one on k, which changes no weight of attention."""
        output_bias: bool = False
        """A bias on o."""
        qk_norm: str = "none"
        """``"rms"`` over the head dimension with one scale for all heads (Qwen3, MoT's code), ``"rms_joint"`` over all
        heads together (OLMoE), ``"layer"`` with scale and shift for every head (Chameleon), or ``"none"``."""
        qk_norm_eps: float = 1e-5
        """Added to the variance in the q/k norm."""
        rope: Rope.Config | None = field(default_factory=Rope.Config)
        """Rotary positions, or None for no positions."""
        towers: TowerMap = "shared"
        """The copy each key's rows meet, at every site that ``site_towers`` does not name."""
        site_towers: dict[str, TowerMap] = field(default_factory=dict)
        """Tower maps of single sites: q_proj, k_proj, v_proj, o_proj, qk_norm."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check_positive("num_heads", "num_kv_heads", "head_dim")
            if self.qk_norm not in QK_NORMS:
                raise ConfigError(f"unknown qk_norm {self.qk_norm!r}; known: {', '.join(QK_NORMS)}")
            if self.num_heads % (self.num_kv_heads or self.num_heads):
                raise ConfigError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
            unknown = set(self.site_towers) - set(SITES)
            if unknown:
                raise ConfigError(f"unknown sites {sorted(unknown)} in site_towers; known: {', '.join(SITES)}")

        @property
        def needs_key_order(self) -> bool:
            return any(towers != "shared" for towers in (self.towers, *self.site_towers.values()))

        @property
        def tp_plan(self) -> dict[str, str]:
            if self.qk_norm == "rms_joint":
                return {}  # it would need all heads on every device
            plan = {"": "bank_attention", "o_proj": "bank_rowwise"}
            plan |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), "bank_colwise")
            return plan | (dict.fromkeys(("q_norm", "k_norm"), "bank_head_norm") if self.qk_norm != "none" else {})

        @property
        def head_copies(self) -> int:
            """How many times ``num_heads`` a row attends with, for counting FLOPs."""
            return 1

        def site_params(self, hidden_size: int) -> dict[str, int]:
            """Weights of one copy of each projection."""
            head_dim = self.head_dim or hidden_size // self.num_heads
            heads = hidden_size * self.num_heads * head_dim
            kv_heads = hidden_size * (self.num_kv_heads or self.num_heads) * head_dim
            return {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": heads}

    def __init__(
        self,
        config: Attention.Config,
        *,
        hidden_size: int,
        num_modalities: int,
        layer_idx: int,
        widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.rope = config.rope
        self.layer_idx = layer_idx
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        if config.head_dim is None and hidden_size % config.num_heads:
            raise ConfigError(
                f"hidden_size {hidden_size} must be a multiple of num_heads {config.num_heads}, or set head_dim"
            )
        self.head_dim = config.head_dim or hidden_size // config.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        def towers(site: str) -> tuple[int, ...]:
            return resolve_towers(config.site_towers.get(site, config.towers), num_modalities)

        def width(site: str) -> Width:
            return copy_widths(site, towers(site), hidden_size, widths)

        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = linear_bank(towers("q_proj"), width("q_proj"), heads, config.bias)
        self.k_proj = linear_bank(towers("k_proj"), width("k_proj"), kv_heads, config.bias and config.key_bias)
        self.v_proj = linear_bank(towers("v_proj"), width("v_proj"), kv_heads, config.bias)
        self.o_proj = linear_bank(towers("o_proj"), heads, width("o_proj"), config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm == "rms":
            self.q_norm = BankRMSNorm(towers("qk_norm"), self.head_dim, config.qk_norm_eps)
            self.k_norm = BankRMSNorm(towers("qk_norm"), self.head_dim, config.qk_norm_eps)
        elif config.qk_norm == "rms_joint":
            self.q_norm = BankJointRMSNorm(towers("qk_norm"), heads, config.qk_norm_eps)
            self.k_norm = BankJointRMSNorm(towers("qk_norm"), kv_heads, config.qk_norm_eps)
        elif config.qk_norm == "layer":
            self.q_norm = BankHeadLayerNorm(towers("qk_norm"), self.num_heads, self.head_dim, config.qk_norm_eps)
            self.k_norm = BankHeadLayerNorm(towers("qk_norm"), self.num_kv_heads, self.head_dim, config.qk_norm_eps)

    def rotary(self) -> tuple[Rope.Config, int] | None:
        """See :class:`BaseAttention`."""
        return None if self.rope is None else (self.rope, self.head_dim)

    def forward(
        self, x: Tensor, rows: RowLayout, mask: AttentionMask, cache: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixes positions.

        Args:
            x: ``(N, D)`` rows.
            rows: their layout, with the rotary table.
            mask: who may attend to whom.
            cache: a transformers cache that already holds what came before, or None.

        Returns:
            ``(N, D)`` rows, or those that ``rows.asked`` names, and ``(B, H, Q, K)`` attention weights where the
            implementation gives them.
        """
        asked = rows.asked
        asking, placed, seen = (x, rows, mask) if asked is None else (x[asked.index], asked.rows, asked.mask)
        query = self._heads(self.q_proj(asking, placed))
        key, value = self._heads(self.k_proj(x, rows)), self._heads(self.v_proj(x, rows))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query, placed), self.k_norm(key, rows)
        if self.rope is not None and rows.cos is not None and rows.sin is not None:
            assert placed.cos is not None
            assert placed.sin is not None
            query, key = rope(query, placed.cos, placed.sin), rope(key, rows.cos, rows.sin)
        query = placed.to_time(query).transpose(1, 2)
        key, value = (rows.to_time(part).transpose(1, 2) for part in (key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed, weights = self._attend(query, key, value, seen)
        return self.o_proj(placed.to_rows(mixed.flatten(2)), placed), weights

    def _heads(self, x: Tensor) -> Tensor:
        """``(N, H·C)`` to ``(N, H, C)``, as many heads as there are here."""
        return x.view(len(x), x.shape[1] // self.head_dim, self.head_dim)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor | None]:
        if mask.bias is not None:
            mask = BiasedMask.add(mask, mask.bias.of(self.layer_idx).to(query.dtype))
        if mask.attend is not None:
            return mask.attend(self, query, key, value, mask)
        return scaled_dot_product(self, query, key, value, mask)


def scaled_dot_product(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask
) -> tuple[Tensor, None]:
    """Fused attention under a mask rule; in plain operations where those are faster.

    Args:
        module: gives the scaling.
        query: ``(B, H, Q, C)``.
        key: ``(B, H_kv, K, C)``.
        value: ``(B, H_kv, K, C)``.
        mask: who may attend to whom.

    Returns:
        ``(B, Q, H, C)`` and None, since the fused kernel keeps no weights.
    """
    if _is_faster_unfused(query, key):
        return eager(module, query, key, value, mask)[0], None
    # a branch, since a traced comparison of open sizes is no Boolean for the kernel
    if mask.is_plain_causal and mask.query_length == key.shape[2] and mask.query_length > 1:
        return attend(query, key, value, scale=module.scaling, is_causal=True), None
    return attend(query, key, value, None if mask.needs_no_mask else mask.shown(), scale=module.scaling), None


def _is_faster_unfused(query: Tensor, key: Tensor) -> bool:
    """Whether this is training in bfloat16 on a CPU over short rows, without our kernel."""
    is_trained = torch.is_grad_enabled() and query.requires_grad
    if not is_trained or query.device.type != "cpu" or query.dtype != torch.bfloat16 or key.shape[2] > 256:
        return False
    return torch.compiler.is_compiling() or bool(missing_kernels())


def eager(module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """The same in plain operations, with the attention weights ``(B, H, Q, K)``; else as :func:`scaled_dot_product`."""
    key, value = (for_each_query(part, module.num_key_value_groups) for part in (key, value))
    scores = (query @ key.transpose(2, 3)) * module.scaling
    if not mask.needs_no_mask:
        scores = scores + mask.additive(scores.dtype)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights
