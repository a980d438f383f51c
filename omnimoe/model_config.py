"""The model's config: a transformers config whose parts are the dataclasses of the tiers below."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from dataclasses import field
from typing import Any, ClassVar, Self

import torch
from transformers import GenerationConfig, PreTrainedConfig

from omnimoe.backbone import Block, LayerRange
from omnimoe.config import Config, ConfigError, check_types
from omnimoe.experts import Experts, FeedForward
from omnimoe.layers import MASK_RULES, Attention, BaseAttention, Norm, PositionBias
from omnimoe.layers.keys import keys_of_rule
from omnimoe.layers.masks import is_causal_rule
from omnimoe.modalities import Modality, TokenRange, Tokens

_PARTS: dict[str, type[Config]] = {
    "attention": BaseAttention.Config,
    "experts": Experts.Config,
    "norm": Norm.Config,
    "mlp_norm": Norm.Config,
    "position_bias": PositionBias.Config,
    "final_norm": Norm.Config,
}
_LISTS: dict[str, type[Config]] = {"modalities": Modality.Config, "layers": LayerRange}
_READ_BY_TRANSFORMERS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
}
"""What configs of transformers take besides their fields."""
_LIMITS = {"hidden_size": 2**20, "num_layers": 4096, "vocab_size": 2**26, "max_position_embeddings": 2**40}
"""Sizes past those of any model, by which a config that was damaged or made to hurt is told."""
_PUBLISHED = {
    "family": (str, "the name of a family"),
    "files": (dict, "a mapping of file names to what they hold"),
    **dict.fromkeys(("absent", "kept", "repeated"), (list, "a list of names")),
}
"""What a converted checkpoint remembers, and how."""
_CLASS_FIELDS = {"model_type", "keys_to_ignore_at_inference", "attribute_map"}


class OmniMoeConfig(PreTrainedConfig):
    """Declares a model: its modalities, and one layer's attention, experts and norms with changes by layer range.

    Example:
        >>> text, image = Tokens.Config(name="text", vocab_size=512), Tokens.Config(name="image", vocab_size=256)
        >>> config = OmniMoeConfig(hidden_size=64, num_layers=2, modalities=(text, image))
        >>> config.vocab_size, config.modality_names
        (768, ('text', 'image'))
    """

    model_type: ClassVar[str] = "omnimoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("losses", "counts", "token_losses", "predictions", "aux_loss", "past_key_values"),
        *("hidden_states", "attentions", "router_logits", "routings", "rows"),
    ]
    """What the Trainer does not gather: of an output it predicts the logits."""
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}

    hidden_size: int = 256
    """Width D of the residual stream."""
    num_layers: int = 4
    """Layers L."""
    widths: tuple[int, ...] = ()
    """Width of the rows of each modality, where towers differ in width: narrower rows fill the first columns of
    ``hidden_size``, and the rest is zero. Empty for ``hidden_size`` everywhere."""
    embedding_scale: float = 1.0
    """What rows of the embedding table are multiplied by on the way in."""
    modalities: tuple[Modality.Config, ...] = (Tokens.Config(name="text", vocab_size=256),)
    """The modalities; a modality's place here is its id."""
    attention: BaseAttention.Config = field(default_factory=Attention.Config)
    """Attention of every layer."""
    experts: Experts.Config = field(default_factory=FeedForward.Config)
    """Experts of every layer."""
    norm: Norm.Config = field(default_factory=Norm.Config)
    """Norms of every layer."""
    mlp_norm: Norm.Config | None = None
    """The norm before the experts of every layer, where it is another than ``norm``."""
    norm_placement: str = "pre"
    """``"pre"`` or ``"post"`` ("swin")."""
    layer_scale: float = 0.0
    """Start of a learned factor for every column of what each branch adds; 0 for none."""
    final_norm: Norm.Config = field(default_factory=Norm.Config)
    """The norm before the heads."""
    layers: tuple[LayerRange, ...] = ()
    """Changes to ranges of layers, applied in order."""
    keys: tuple[str, ...] = ()
    """Names of the keys that pick copies, where they are not the modalities: ``("und", "gen")``. The caller then passes
    ``key_ids``."""
    key_rule: str = ""
    """Name of the rule that gives ``key_ids`` where the caller does not: ``"joint"`` for the modality where a sequence
    has one, and that plus the number of modalities where it has several (VLMo). Empty where they must be passed."""
    mask: str = "causal"
    """Name of the mask rule; ``"bidirectional"`` makes an encoder."""
    bidirectional_modalities: tuple[str, ...] = ()
    """Modalities whose spans are blocks under the rule ``"block_causal"``."""
    block_markers: bool = False
    """Blocks take in the begin and end token of their span."""
    private_noise: bool = False
    """A span whose rows carry noise is a private block: nothing outside of it sees it."""
    joint_blocks: bool = False
    """Neighbouring spans of ``bidirectional_modalities`` are one block."""
    private_blocks: bool = False
    """Every block is private, with noise or without."""
    positions: str = "time"
    """``"time"``: one on for every token. ``"blocks"``: the tokens of a block share one position, and a private block
    takes none of its own (BAGEL). ``"grids"``: in time, row and column, by the shapes of the pictures and clips in
    ``features`` (Qwen2-VL, ERNIE-4.5-VL). ``"spans"``: from 0 in each span of one modality (BEiT-3)."""
    learned_positions: tuple[int, ...] = ()
    """Rows of the table of learned positions of each modality, 0 for none, which are added to what enters; empty where
    no modality has one."""
    position_offset: int = 0
    """Row of those tables that position 0 meets: 2 in what was trained with fairseq."""
    position_bias: PositionBias.Config | None = None
    """Scores that attention adds by where two tokens stand, which ``positions`` counts."""
    modality_rows: bool = False
    """A learned row for each modality, added to what enters."""
    embedding_norm_eps: float = 0.0
    """Added to the variance in a norm of what comes out of the embedding table, behind a learned row added to it, as in
    BERT; 0 for neither."""
    markers: str = "text"
    """Group of boundary tokens: ``"text"`` leaves them to the modality whose range holds them, ``"own"`` gives a span's
    begin and end token to the span's modality, ``"key"`` leaves them where they are and lets them meet the copies and
    experts of the span's modality (ERNIE-4.5-VL)."""
    vocab_size: int = 0
    """Rows of the embedding table; 0 takes what the modalities need."""
    head_bias: bool = False
    """A bias on the head over the vocabulary."""
    head_norm_eps: float = 0.0
    """Added to the variance in the norm of a layer before that head, as in BERT; 0 for no such layer."""
    aligned_size: int = 0
    """Width of the vectors by which inputs of several modalities are compared, one map a modality from the first row of
    each; 0 for no such maps."""
    aligned_bias: bool = False
    """Biases on those maps."""
    pooled_labels: int = 0
    """Labels of a head over the first row of a sequence, behind a layer of its own: 2 for whether a picture and a text
    go together; 0 for no such head."""
    tie_word_embeddings: bool = False
    """One matrix for embedding and head."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    max_position_embeddings: int = 4096
    """Longest sequence the model was made for."""
    pad_token_id: int | None = None
    """Padding, where the vocabulary has one."""
    bos_token_id: int | None = None
    """Begin of a document."""
    eos_token_id: int | list[int] | None = None
    """End of a document."""
    use_cache: bool = True
    """Keep keys and values in generation."""
    output_router_logits: bool = False
    """Return each layer's raw router logits."""
    published: dict[str, Any] = field(default_factory=dict)
    """Of a converted checkpoint the family and the published config, from which it can be written back; a config that
    is changed loses it."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in _PARTS.items():
            if isinstance(getattr(self, name), dict):
                setattr(self, name, kind.from_dict(getattr(self, name)))
        # transformers keeps whatever it does not know as an attribute, which would hide a slip of the pen
        for name in filter(self._is_foreign, kwargs):
            raise ConfigError(f"OmniMoeConfig has no field {name!r}{self._hint(name)}")
        for name, kind in _LISTS.items():
            if not isinstance(getattr(self, name), list | tuple):
                raise ConfigError(f"{name} must be a tuple of {kind.__qualname__}, got {getattr(self, name)!r}")
            read = (kind.from_dict(item) if isinstance(item, dict) else item for item in getattr(self, name))
            setattr(self, name, tuple(read))
        check_types(self, inspect.get_annotations(OmniMoeConfig).keys() - _CLASS_FIELDS)
        self.keys = tuple(self.keys)
        self.widths = tuple(self.widths)
        self.learned_positions = tuple(self.learned_positions)
        self.bidirectional_modalities = tuple(self.bidirectional_modalities)
        needed = max((held.stop for held in self.token_ranges.values()), default=0)
        if not self.vocab_size:
            self.vocab_size = needed
        self._check(needed)
        super().__post_init__(**kwargs)

    def _check(self, needed: int) -> None:
        names = self.modality_names
        if len(set(names)) != len(names) or not names:
            raise ConfigError(f"a model needs at least one modality and each its own name, got {names}")
        if self.hidden_size < 1 or self.num_layers < 0:
            raise ConfigError(f"hidden_size {self.hidden_size} and num_layers {self.num_layers} must be positive")
        for name, limit in _LIMITS.items():
            if max(getattr(self, name), needed if name == "vocab_size" else 0) > limit:
                raise ConfigError(f"{name} {getattr(self, name):,} is beyond any model; at most {limit:,} is taken")
        if self.max_position_embeddings < 1 or not 0 <= self.initializer_range < float("inf"):
            raise ConfigError(
                f"max_position_embeddings {self.max_position_embeddings} must be positive, and initializer_range "
                f"{self.initializer_range} a number from 0"
            )
        if self.widths:
            self._check_widths()
        for held in self.layers:
            if held.start >= self.num_layers:
                raise ConfigError(
                    f"a range of layers starts at {held.start}, but the model has {self.num_layers} layers; "
                    "they count from 0"
                )
        for layer, block in enumerate(self.blocks):
            for part in (block.experts, block.attention):
                if 0 < part.num_token_ids < self.vocab_size:
                    raise ConfigError(
                        f"the table of the router in layer {layer} has {part.num_token_ids} ids for a vocabulary of "
                        f"{self.vocab_size}; set num_ids={self.vocab_size}"
                    )
        if self.mask not in MASK_RULES:
            raise ConfigError(f"unknown mask rule {self.mask!r}{MASK_RULES.hint(self.mask)}")
        for block in self.blocks:
            block.attention.check_mask(self.mask, self.private_noise or self.private_blocks)
        if self.positions not in ("time", "blocks", "grids", "spans"):
            raise ConfigError(f"positions must be 'time', 'blocks', 'grids' or 'spans', got {self.positions!r}")
        if self.learned_positions:
            self._check_learned()
        if self.position_bias is not None:
            self._check_biases()
        if self.key_rule and keys_of_rule(self.key_rule, len(names)) != len(self.keys or names):
            raise ConfigError(
                f"the key rule {self.key_rule!r} needs {keys_of_rule(self.key_rule, len(names))} keys for the "
                f"modalities {names}, got {self.keys or 'none'}"
            )
        for name in ("layer_scale", "embedding_norm_eps", "head_norm_eps", "pooled_labels"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number from 0, got {getattr(self, name)}")
        wide = [name for name in ("layer_scale", "modality_rows", "pooled_labels") if getattr(self, name)]
        if self.widths and wide:
            raise ConfigError(f"{wide[0]} is as wide as hidden_size; leave widths {self.widths} empty")
        if self.aligned_size < 0 or (self.aligned_size and self.widths):
            raise ConfigError(
                f"aligned_size {self.aligned_size} must be 0 or more, and 0 where towers differ in width, {self.widths}"
            )
        if self.markers not in ("text", "own", "key"):
            raise ConfigError(f"markers must be 'text', 'own' or 'key', got {self.markers!r}")
        unknown = set(self.bidirectional_modalities) - set(names)
        if unknown:
            raise ConfigError(f"bidirectional_modalities names {sorted(unknown)}, but the modalities are {names}")
        if self.vocab_size < needed:
            raise ConfigError(f"vocab_size {self.vocab_size} is less than the {needed} rows that the modalities own")
        for name, (kind, wanted) in _PUBLISHED.items():
            held = self.published.get(name, kind())
            if not isinstance(held, kind) or (kind is list and not all(isinstance(item, str) for item in held)):
                raise ConfigError(
                    f"published[{name!r}] must be {wanted}, got {held!r}; leave it out, or convert the checkpoint again"
                )
        for modality in self.modalities:
            if any(len(ids) != 3 for ids in modality.more_ids):
                raise ConfigError(
                    f"more_ids of modality {modality.name!r} must be begin, end and placeholder of each kind of span, "
                    f"got {modality.more_ids}"
                )
            for ids in modality.ids_of_spans:
                for role, token in zip(("begin_id", "end_id", "placeholder_id"), ids, strict=True):
                    if token is not None and not 0 <= token < self.vocab_size:
                        raise ConfigError(
                            f"{role} {token} of modality {modality.name!r} is outside the {self.vocab_size} rows"
                        )
        if self.markers == "key" and self.keys:
            raise ConfigError(
                f"markers 'key' takes modalities for keys, and the keys are {self.keys}; drop one of them"
            )

    def _check_biases(self) -> None:
        for layer, block in enumerate(self.blocks):
            heads = getattr(block.attention, "num_heads", None)
            if not isinstance(block.attention, Attention.Config) or heads != self.num_attention_heads:
                raise ConfigError(
                    f"position_bias gives scores to {self.num_attention_heads} heads of Attention in every layer, and "
                    f"layer {layer} has {heads} of {type(block.attention).__qualname__}"
                )
            shares = block.attention.num_kv_heads not in (None, heads) or block.attention.head_copies > 1
            if shares or block.depth is not None:
                raise ConfigError(
                    f"layer {layer} shares keys among queries or leaves out rows; with position_bias leave "
                    "num_kv_heads and depth None, and own_heads False"
                )

    def _check_learned(self) -> None:
        if self.widths:
            raise ConfigError(f"learned_positions are as wide as hidden_size; leave widths {self.widths} empty")
        if len(self.learned_positions) != len(self.modalities) or min(self.learned_positions) < 0:
            raise ConfigError(
                f"learned_positions {self.learned_positions} must be one number of rows for each of the "
                f"{len(self.modalities)} modalities, 0 for none"
            )
        if self.position_offset < 0 or any(0 < rows <= self.position_offset for rows in self.learned_positions):
            raise ConfigError(
                f"position_offset {self.position_offset} must lie inside of each table of learned_positions "
                f"{self.learned_positions}"
            )

    def _check_widths(self) -> None:
        if self.keys or len(self.widths) != len(self.modalities):
            raise ConfigError(
                f"widths {self.widths} must be one for each of the {len(self.modalities)} modalities, in a model whose "
                f"keys are its modalities; its keys are {self.keys or 'those'}"
            )
        if min(self.widths) < 1 or max(self.widths) != self.hidden_size:
            raise ConfigError(
                f"widths {self.widths} must be positive and the largest hidden_size, which is {self.hidden_size}"
            )
        for held in self.modalities:
            if held.is_discrete and self.width_of(held.name) != self.hidden_size:
                raise ConfigError(
                    f"modality {held.name!r} shares the embedding table and the head, so its width must be hidden_size "
                    f"{self.hidden_size}, got {self.width_of(held.name)}"
                )
        for layer, block in enumerate(self.blocks):
            for part in (block.attention, block.experts):
                if "widths" not in inspect.signature(part.target).parameters:
                    raise ConfigError(
                        f"{type(part).__qualname__} in layer {layer} has no towers of different widths; leave widths "
                        "empty, or take Attention and FeedForward"
                    )
            if getattr(block.attention, "head_dim", 1) is None:
                raise ConfigError("towers of different widths share the heads of attention, so head_dim must be given")

    def width_of(self, name: str) -> int:
        """Width of the rows of a modality."""
        return self.widths[self.modality_names.index(name)] if self.widths else self.hidden_size

    @property
    def card(self) -> dict[str, Any] | None:
        """What a card tells of licence and data, by :data:`omnimoe.model_card.FACTS`; None where nothing is known.

        It is saved with the rest where it was set.
        """
        return self.__dict__.get("card")

    @card.setter
    def card(self, facts: dict[str, Any] | None) -> None:
        self.__dict__["card"] = facts

    @property
    def modality_names(self) -> tuple[str, ...]:
        """The modalities in the order of their ids."""
        return tuple(modality.name for modality in self.modalities)

    @property
    def input_only(self) -> tuple[str, ...]:
        """Modalities that only enter, as features in a form of their own."""
        return tuple(modality.name for modality in self.modalities if modality.is_input_only)

    @property
    def own_form(self) -> tuple[str, ...]:
        """Continuous modalities whose features come in a form of their own, not as rows ``(n, C)``."""
        return tuple(modality.name for modality in self.modalities if modality.has_own_form)

    @property
    def num_keys(self) -> int:
        """Keys that tower maps are written over: the modalities unless ``keys`` names others."""
        return len(self.keys) or len(self.modalities)

    @property
    def token_ranges(self) -> dict[str, TokenRange]:
        """The rows of the vocabulary that each discrete modality owns."""
        ranges, start = {}, 0
        for modality in self.modalities:
            if isinstance(modality, Tokens.Config):
                first = start if modality.vocab_start is None else modality.vocab_start
                ranges[modality.name] = TokenRange(
                    name=modality.name,
                    start=first,
                    size=modality.vocab_size,
                    begin_id=modality.begin_id,
                    end_id=modality.end_id,
                    num_tokens=modality.num_tokens,
                    frame_size=modality.frame_size,
                )
                start = first + modality.vocab_size
        return ranges

    def modality_of_ids(self, *, markers: str | None = None) -> torch.Tensor:
        """The modality of every row of the vocabulary.

        Args:
            markers: overrides the field of the same name.

        Returns:
            ``(V,)`` int64 on the CPU; rows that nobody owns belong to modality 0.
        """
        table = torch.zeros(self.vocab_size, dtype=torch.int64)
        ranges = self.token_ranges
        for modality_id, modality in enumerate(self.modalities):
            if modality.name in ranges:
                table[ranges[modality.name].start : ranges[modality.name].stop] = modality_id
        for modality_id, modality in enumerate(self.modalities):
            for begin, end, placeholder in modality.ids_of_spans:
                if placeholder is not None:
                    table[placeholder] = modality_id
                for token in (begin, end) if (markers or self.markers) == "own" else ():
                    if token is not None:
                        table[token] = modality_id
        return table

    def key_of_markers(self) -> torch.Tensor:
        """The key of every boundary token, where ``markers`` gives it that of the span.

        Returns:
            ``(V,)`` int64 on the CPU, -1 for all other rows of the vocabulary.
        """
        table = torch.full((self.vocab_size,), -1, dtype=torch.int64)
        for key, modality in enumerate(self.modalities):
            ends = [token for begin, end, _ in modality.ids_of_spans for token in (begin, end) if token is not None]
            table[ends] = key
        return table

    @property
    def blocks(self) -> list[Block.Config]:
        """The config of each layer."""
        base = Block.Config(
            attention=self.attention,
            experts=self.experts,
            norm=self.norm,
            mlp_norm=self.mlp_norm,
            norm_placement=self.norm_placement,
            layer_scale=self.layer_scale,
        )
        blocks = [base] * self.num_layers
        for changed in self.layers:
            stop = self.num_layers if changed.stop is None else min(changed.stop, self.num_layers)
            for layer_idx in range(changed.start, stop, changed.step):
                blocks[layer_idx] = changed.change(blocks[layer_idx])
        return blocks

    @property
    def needs_key_order(self) -> bool:
        """Whether anything in the model has copies by key, so that rows are sorted."""
        return self.final_norm.towers != "shared" or any(block.needs_key_order for block in self.blocks)

    @property
    def is_causal(self) -> bool:
        """Whether no position depends on a later one: the mask, and every router."""
        return is_causal_rule(self.mask) and all(block.is_causal for block in self.blocks)

    @property
    def needs_token_ids(self) -> bool:
        """Whether a router looks up the token of a row."""
        return any(part.num_token_ids for block in self.blocks for part in (block.experts, block.attention))

    @property
    def mixes_rows(self) -> bool:
        """Whether some router mixes rows, so that it must know the documents of a packed sequence."""
        routers = (getattr(part, "router", None) for block in self.blocks for part in (block.attention, block.experts))
        return any(router is not None and router.mixes_rows for router in routers)

    @property
    def layer_types(self) -> list[str] | None:
        """What a cache keeps of each layer, where it is not keys and values everywhere."""
        found = [block.attention.cache_type for block in self.blocks]
        return found if set(found) - {"full_attention"} else None

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first layer's kind."""
        return getattr(self.attention, "num_heads", 1)

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads of the first layer's kind."""
        return getattr(self.attention, "num_kv_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return getattr(self.attention, "head_dim", None) or self.hidden_size // self.num_attention_heads

    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "embed_tokens": "free_full_weight",
        "backbone.layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "backbone.layers": (["x", "rows", "mask", "cache"], ["x", "routings", "weights"]),
        "norm": (["x", "rows"], ["x"]),
    }

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """How tensor parallelism splits the model: the plans of its attention and experts; None where nothing has one.

        Towers of different widths have none, nor do learned position biases. See docs/scaling.md.
        """
        return None if self.widths or self.position_bias is not None else self._plan("tp_plan")

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """How expert parallelism does; None without experts that a router chooses."""
        return self._plan("ep_plan")

    def _plan(self, kind: str) -> dict[str, str] | None:
        found: dict[str, str] = {}
        for plan in self.layer_plans(kind):
            for name, style in plan.items():
                path = f"backbone.layers.*.{name}"
                if found.setdefault(path, style) != style:
                    raise ConfigError(
                        f"the layers disagree on the {kind} of {path}: {found[path]!r} and {style!r}; give parts "
                        "that are split in another way another name"
                    )
        return found or None

    def layer_plans(self, kind: str) -> list[dict[str, str]]:
        """The ``"tp_plan"`` or ``"ep_plan"`` of each layer, with names as below the layer."""
        plans = []
        for block in self.blocks:
            parts = {"self_attn": getattr(block.attention, kind, {}), "mlp": getattr(block.experts, kind, {})}
            held = {f"{part}.{name}".rstrip("."): plan[name] for part, plan in parts.items() for name in plan}
            plans.append(held)
        return plans

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; the vocabulary follows the modalities unless it is given.

        Raises:
            ConfigError: if a field does not exist; the message names the nearest one.
        """
        own = {spec.name for spec in dataclasses.fields(self)}
        for name in changes:
            if name not in own and name not in self.attribute_map:
                near = difflib.get_close_matches(name, sorted(own), n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                if name == "quantization_config":
                    meant = "; fresh weights are quantised by omnimoe.quantize(model)"
                raise ConfigError(f"OmniMoeConfig has no field {name!r}{meant}")
        values = {name: getattr(self, name) for name in own}
        if "modalities" in changes:
            values["vocab_size"] = 0
        if changes:
            values["published"] = {}
        for name, value in changes.items():
            values[self.attribute_map.get(name, name)] = value
        return type(self)(**values)

    @classmethod
    def _is_foreign(cls, name: str) -> bool:
        known = {spec.name for spec in dataclasses.fields(cls)} | set(cls.attribute_map) | _READ_BY_TRANSFORMERS
        known |= set(GenerationConfig._get_default_generation_params())
        return name not in known and not name.startswith("_")

    def _hint(self, name: str) -> str:
        for part, kind in _PARTS.items():
            held = type(getattr(self, part) or kind())
            if name in (spec.name for spec in dataclasses.fields(held)):
                return f"; it belongs to {part}: write {part}={held.__qualname__}({name}=...)"
        near = difflib.get_close_matches(name, inspect.get_annotations(OmniMoeConfig), n=1)
        return f"; did you mean {near[0]!r}?" if near else "; set attributes of your own on the config once it is made"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in transformers: what a file holds beyond the fields, from another version or tool, becomes an attribute.

        Raises:
            ConfigError: if a field of the file is nearly one of ours, or holds what it cannot.
        """
        foreign = {name: value for name, value in config_dict.items() if cls._is_foreign(name)}
        for name in foreign:
            near = difflib.get_close_matches(name, inspect.get_annotations(OmniMoeConfig), n=1, cutoff=0.85)
            if near:
                raise ConfigError(f"OmniMoeConfig has no field {name!r}; did you mean {near[0]!r}?")
        own = {name: value for name, value in config_dict.items() if name not in foreign}
        made = super().from_dict(own, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, value in foreign.items():
            setattr(config, name, value)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values, parts as ``{"type": name, ...}``."""
        plain = super().to_dict()
        for name in _PARTS:
            plain[name] = None if getattr(self, name) is None else getattr(self, name).to_dict()
        for name in _LISTS:
            plain[name] = [item.to_dict() for item in getattr(self, name)]
        return plain

    def declaration(self) -> dict[str, Any]:
        """Plain values of the fields alone, without what saving adds."""
        return {name: held for name, held in self.to_dict().items() if name in OmniMoeConfig.__annotations__}
