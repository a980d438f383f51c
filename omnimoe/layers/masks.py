"""Mask rules: who may attend to whom, each defined once.

A rule is a function of two views, one of the querying and one of the attended positions, whose fields broadcast against
each other. Evaluated on whole axes it gives a dense mask; evaluated on single indices it is FlexAttention's
``mask_mod``. Padding and segment borders (packing) hold under every rule and are added here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from omnimoe.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
    """What a rule may know of positions. Fields broadcast: ``(..., Q, 1)`` of queries, ``(..., 1, K)`` of keys.

    Args:
        order: int64, place in the sequence, counted through the cache.
        key_ids: int64, the key that picks the tower.
        block_ids: int64, the block a position belongs to, -1 for none, -2 and below for blocks that only
            :func:`block_causal` knows.
    """

    order: Tensor
    key_ids: Tensor
    block_ids: Tensor


MaskRule = Callable[[Positions, Positions], Tensor]
"""``(query, key) -> bool``, True where the query may attend to the key."""

MASK_RULES: Registry[MaskRule] = Registry("mask rule")


@dataclasses.dataclass(frozen=True)
class _Declared:
    """What a rule's author said of it."""

    is_causal: bool = False
    reads_key_ids: bool = False
    blocks_only_add: bool = False


_DECLARED: dict[MaskRule, _Declared] = {}
_UNCACHED: dict[MaskRule, tuple[str, ...]] = {}


def register_mask_rule(
    name: str,
    *,
    is_causal: bool = False,
    reads_key_ids: bool = False,
    blocks_only_add: bool = False,
    exist_ok: bool = False,
) -> Callable[[MaskRule], MaskRule]:
    """Decorator that files a mask rule under ``name``, with what the model must know of it.

    Args:
        name: as configs write it.
        is_causal: no position depends on a later one, so the model may generate token by token.
        reads_key_ids: compares keys. A cache keeps none, so the rule has no cached decoding. A rule that reads them
            without saying so has none either.
        blocks_only_add: blocks let a position see later ones, and never hide an earlier one. Then a cache, which keeps
            no blocks, changes nothing; a rule that reads blocks and does not say so has no cached decoding.
        exist_ok: replace a rule of the same name.

    Raises:
        RegistryError: if the name is malformed or taken.
    """

    def file_under(rule: MaskRule) -> MaskRule:
        MASK_RULES.register(name, exist_ok=exist_ok)(rule)
        _DECLARED[rule] = _Declared(is_causal, reads_key_ids, blocks_only_add)
        _UNCACHED.pop(rule, None)
        return rule

    return file_under


def is_causal_rule(name: str) -> bool:
    """Whether no position depends on a later one under the rule, as it was registered."""
    return _DECLARED.get(MASK_RULES.get(name), _Declared()).is_causal


def generates_under(name: str) -> bool:
    """Whether the rule is causal but for blocks, which a prompt may hold: then tokens can be generated one by one."""
    declared = _DECLARED.get(MASK_RULES.get(name), _Declared())
    return declared.is_causal or declared.blocks_only_add


def uncached_facts(name: str) -> tuple[str, ...]:
    """What a rule must know of earlier positions that a cache does not keep; a rule with any has no cached decoding.

    Args:
        name: of the rule.

    Returns:
        Of ``"key_ids"`` and ``"block_ids"``, those it declares or reads.
    """
    rule = MASK_RULES.get(name)
    if rule not in _UNCACHED:
        _UNCACHED[rule] = _probed(rule, _DECLARED.get(rule, _Declared()))
    return _UNCACHED[rule]


def _probed(rule: MaskRule, declared: _Declared) -> tuple[str, ...]:
    one = torch.zeros(1, 1, dtype=torch.int64)
    query, key = Positions(order=one + 1, key_ids=one, block_ids=one), _Watched(order=one, key_ids=one, block_ids=one)
    rule(query, cast(Positions, key))
    read = key.read | ({"key_ids"} if declared.reads_key_ids else set())
    return tuple(sorted(read - ({"block_ids"} if declared.blocks_only_add else set())))


class _Watched:
    """One position that remembers which of its facts a rule asked for."""

    def __init__(self, **facts: Tensor) -> None:
        self._facts = facts
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._facts:
            raise AttributeError(f"a mask rule knows order, key_ids and block_ids of a position, not {name!r}")
        if name != "order":
            self.read.add(name)
        return self._facts[name]


@register_mask_rule("causal", is_causal=True)
def causal(query: Positions, key: Positions) -> Tensor:
    """A position attends to itself and to what came before."""
    return query.order >= key.order


@register_mask_rule("bidirectional")
def bidirectional(query: Positions, key: Positions) -> Tensor:
    """Everything attends to everything: an encoder."""
    return query.order == query.order + 0 * key.order


@register_mask_rule("block_causal", blocks_only_add=True)
def block_causal(query: Positions, key: Positions) -> Tensor:
    """Causal, but bidirectional inside a block: Transfusion's rule, with a block a picture.

    Nothing outside of a private block, one whose id is below -1, sees it: BAGEL's rule for pictures being drawn. A
    cache keeps no blocks, so a private one must not be left in it.
    """
    inside = (query.block_ids == key.block_ids) & (key.block_ids != -1)
    return ((query.order >= key.order) & (key.block_ids >= -1)) | inside


@register_mask_rule("prefix", blocks_only_add=True)
def prefix(query: Positions, key: Positions) -> Tensor:
    """Causal after a prefix, block 0, that every position sees whole."""
    return (query.order >= key.order) | (key.block_ids == 0)


@register_mask_rule("one_way", is_causal=True, reads_key_ids=True)
def one_way(query: Positions, key: Positions) -> Tensor:
    """Causal, and a tower sees only its own or a lower key: a later tower reads an earlier one, never back."""
    return (query.order >= key.order) & (key.key_ids <= query.key_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """The mask of one forward: a rule and the facts it is evaluated on.

    Args:
        rule: name of the rule.
        query_length: Q.
        key_length: K, with what a cache holds before the queries.
        past_length: positions in the cache before the first query; a scalar tensor in a traced graph.
        device: where masks are made.
        valid: ``(B, K)`` bool, False at padding; None without padding.
        segment_ids: ``(B, K)`` int64, the document of each position in a packed row; None without packing.
        key_ids: ``(B, Q)`` int64.
        block_ids: ``(B, Q)`` int64, -1 for none; None without blocks.
        bias: gives what the layers add to their scores, by :class:`~omnimoe.layers.PositionBias`; None for nothing.
        attend: computes the attention; a function with the signature of transformers' attention interface.
            None takes PyTorch's scaled dot product.
    """

    rule: str
    query_length: int
    key_length: int
    past_length: int | Tensor
    device: torch.device
    valid: Tensor | None = None
    segment_ids: Tensor | None = None
    key_ids: Tensor
    block_ids: Tensor | None = None
    bias: Any = None
    attend: Callable | None = None
    _cached: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def is_plain_causal(self) -> bool:
        """Causal with nothing to hide: kernels need no mask."""
        return self.rule == "causal" and self.valid is None and self.segment_ids is None

    @property
    def needs_no_mask(self) -> bool:
        """Every query may see every key: a step of plain causal decoding, or a plain encoder."""
        if self.has_unwritten:
            return False
        whole = self.rule == "bidirectional" and self.valid is None and self.segment_ids is None
        return whole or (self.is_plain_causal and self.query_length == 1)

    @property
    def has_unwritten(self) -> bool:
        """Whether keys stand for places of a cache of fixed size that nothing may have been written to."""
        return isinstance(self.past_length, Tensor) or self.key_length > self.past_length + self.query_length

    def last(self, count: int) -> AttentionMask:
        """The mask of the last ``count`` queries alone, over the same keys.

        It is whole in :meth:`dense`, :meth:`shown` and :meth:`additive`; :meth:`allowed` and :meth:`flex` know no
        blocks of the queries that are gone.
        """
        blocks = None if self.block_ids is None else self.block_ids[:, -count:]
        # blocks of earlier queries are unknown to the fewer, so what is not plain is cut out of the whole
        cached = {} if self.is_plain_causal else {"dense": self.dense()[:, :, -count:]}
        return dataclasses.replace(
            self,
            query_length=count,
            past_length=self.past_length + self.query_length - count,
            key_ids=self.key_ids[:, -count:],
            block_ids=blocks,
            _cached=cached,
        )

    def allowed(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries may attend to keys, by index; arguments broadcast, as FlexAttention's ``mask_mod`` has it.

        Args:
            batch: int64 indices into B.
            query: int64 indices into Q.
            key: int64 indices into K.

        Returns:
            Bool, the broadcast shape of the arguments. A padding query is allowed itself, so that no row is empty.
        """
        order = query + self.past_length
        asking, asked = self._view(batch, query, order), self._view(batch, key - self.past_length, key)
        seen = MASK_RULES.get(self.rule)(asking, asked)
        if self.segment_ids is not None:
            seen = seen & (self.segment_ids[batch, order] == self.segment_ids[batch, key])
        if self.has_unwritten:
            seen = seen & (key < self.past_length + self.query_length)
        if self.valid is not None:
            seen = (seen & self.valid[batch, key]) | (order == key)
        return seen

    def _view(self, batch: Tensor, index: Tensor, order: Tensor) -> Positions:
        inside = (index >= 0) & (index < self.query_length)
        index = index.clamp(0, self.query_length - 1)
        key_ids = self.key_ids[batch, index]
        none = torch.full_like(key_ids, -1)
        blocks = none if self.block_ids is None else torch.where(inside, self.block_ids[batch, index], none)
        return Positions(order=order, key_ids=key_ids, block_ids=blocks)

    def dense(self) -> Tensor:
        """``(B, 1, Q, K)`` bool, True where attention is allowed; B is 1 where all rows of the batch are alike."""
        if "dense" not in self._cached:
            batch = torch.arange(self.key_ids.shape[0], device=self.device).view(-1, 1, 1)
            query = torch.arange(self.query_length, device=self.device).view(1, -1, 1)
            key = torch.arange(self.key_length, device=self.device).view(1, 1, -1)
            self._cached["dense"] = self.allowed(batch, query, key).unsqueeze(1)
        return self._cached["dense"]

    def shown(self) -> Tensor | None:
        """:meth:`dense`, or None where every query may see every key and the host may know it at no cost."""
        mask = self.dense()
        if mask.dtype != torch.bool or mask.device.type != "cpu" or torch.compiler.is_compiling():
            return mask
        if "all" not in self._cached:
            self._cached["all"] = bool(mask.all())
        return None if self._cached["all"] else mask

    def additive(self, dtype: torch.dtype) -> Tensor:
        """``(B, 1, Q, K)`` of zeros, and the lowest number of ``dtype`` where attention is not allowed."""
        if dtype not in self._cached:
            low = torch.zeros((), dtype=dtype, device=self.device), torch.finfo(dtype).min
            self._cached[dtype] = torch.where(self.dense(), low[0], low[1])
        return self._cached[dtype]

    def flex(self):
        """The same rule as a FlexAttention block mask."""
        if "flex" not in self._cached:
            from torch.nn.attention.flex_attention import create_block_mask

            self._cached["flex"] = create_block_mask(
                lambda batch, head, query, key: self.allowed(batch, query, key),
                self.key_ids.shape[0],
                None,
                self.query_length,
                self.key_length,
                device=str(self.device),
            )
        return self._cached["flex"]
