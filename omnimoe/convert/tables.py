"""Tables of decoders of the Llama line: what their layers are called, and where that goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omnimoe.convert.changes import Change
from omnimoe.convert.rules import Rule, bank, rename
from omnimoe.encoders.siglip import Siglip
from omnimoe.experts import RoutedExperts
from omnimoe.model import OmniMoeConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NETWORK = ("gate_proj", "up_proj", "down_proj")
ROTARY_TABLES = {r".*\.rotary_emb\.inv_freq": "tables of rotary frequencies, which are computed here"}
"""What old files hold besides weights."""


def outer_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """Embedding, final norm and head."""
    yield rename("model.embed_tokens.weight", "model.embed_tokens.weight")
    yield bank("model.norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield rename("lm_head.weight", "lm_head.weight")


def tied_head(config: OmniMoeConfig) -> dict[str, str]:
    """The head that some files hold although it is the embedding."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def layers(config: OmniMoeConfig) -> Iterator[tuple[str, str, Any]]:
    """The published prefix, our prefix and the config of each layer."""
    for index, block in enumerate(config.blocks):
        yield f"model.layers.{index}", f"model.backbone.layers.{index}", block


def norm_rules(theirs: str, ours: str) -> Iterator[Rule]:
    """Both norms of a layer."""
    yield bank(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight")
    yield bank(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight")


def attention_rules(theirs: str, ours: str, attention: Any) -> Iterator[Rule]:
    """Grouped-query attention, with biases and norms where it has them."""
    for site in ATTENTION:
        yield bank(f"{ours}.self_attn.{site}.weight", f"{theirs}.self_attn.{site}.weight")
        if attention.output_bias if site == "o_proj" else attention.bias:
            yield bank(f"{ours}.self_attn.{site}.bias", f"{theirs}.self_attn.{site}.bias")
    if attention.qk_norm != "none":
        for site in ("q_norm", "k_norm"):
            yield bank(f"{ours}.self_attn.{site}.weight", f"{theirs}.self_attn.{site}.weight")
            if attention.qk_norm == "layer":
                yield bank(f"{ours}.self_attn.{site}.bias", f"{theirs}.self_attn.{site}.bias")


def network_rules(theirs: tuple[str, ...] | str, ours: str, names: tuple[str, str, str] = NETWORK) -> Iterator[Rule]:
    """A bank of gated networks.

    Args:
        theirs: the published prefix of each copy.
        ours: our prefix of the bank.
        names: of gate, up and down.
    """
    prefixes = (theirs,) if isinstance(theirs, str) else theirs
    gate, up, down = names
    yield bank(f"{ours}.gate_up_proj", *((f"{held}.{gate}.weight", f"{held}.{up}.weight") for held in prefixes))
    yield bank(f"{ours}.down_proj", *(f"{held}.{down}.weight" for held in prefixes))


def dense_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    """The table of a dense decoder: Llama, Qwen2, Qwen3."""
    yield from outer_rules(config)
    for theirs, ours, block in layers(config):
        yield from norm_rules(theirs, ours)
        yield from attention_rules(theirs, ours, block.attention)
        yield from network_rules(f"{theirs}.mlp", f"{ours}.mlp.experts")


def routed_rules(
    config: OmniMoeConfig,
    *,
    mlp: str = "mlp",
    names: tuple[str, str, str] = NETWORK,
    shared: str | None = None,
    shared_gate: str | None = None,
) -> Iterator[Rule]:
    """The table of a decoder whose layers are mixtures of experts, or in part one network.

    Args:
        config: of the model.
        mlp: published name of the mixture in a layer.
        names: of gate, up and down of an expert.
        shared: published name of the shared expert in the mixture.
        shared_gate: published name of its gate.
    """
    yield from outer_rules(config)
    for theirs, ours, block in layers(config):
        yield from norm_rules(theirs, ours)
        yield from attention_rules(theirs, ours, block.attention)
        if isinstance(block.experts, RoutedExperts.Config):
            yield from mixture_rules(f"{theirs}.{mlp}", f"{ours}.mlp", block.experts, names)
            if shared is not None:
                yield from network_rules(f"{theirs}.{mlp}.{shared}", f"{ours}.mlp.shared_experts")
            if shared_gate is not None:
                yield rename(f"{ours}.mlp.shared_gate.weight", f"{theirs}.{mlp}.{shared_gate}.weight")
        else:
            yield from network_rules(f"{theirs}.mlp", f"{ours}.mlp.experts")


def mixture_rules(
    theirs: str, ours: str, experts: RoutedExperts.Config, names: tuple[str, str, str] = NETWORK
) -> Iterator[Rule]:
    """A router and its experts, which are published one by one."""
    yield rename(f"{ours}.router.scorer.weight", f"{theirs}.gate.weight")
    published = tuple(f"{theirs}.experts.{expert}" for expert in range(experts.num_experts))
    yield from network_rules(published, f"{ours}.experts", names)


def siglip_rules(encoder: Siglip.Config, theirs: str, ours: str, *, kernel: Change | None = None) -> Iterator[Rule]:
    """The table of a SigLIP tower.

    Args:
        encoder: its config.
        theirs: the published prefix.
        ours: our prefix.
        kernel: what happens to the map of patches, where it is published as the kernel of a convolution.
    """
    yield rename(f"{ours}.position_embedding.weight", f"{theirs}.embeddings.position_embedding.weight")
    into = f"{theirs}.embeddings.patch_embedding"
    yield rename(f"{ours}.patch_embedding.weight", f"{into}.weight", change=kernel or Change())
    yield rename(f"{ours}.patch_embedding.bias", f"{into}.bias")
    parts = ("layer_norm1", "layer_norm2", *(f"self_attn.{site}_proj" for site in ("q", "k", "v", "out")))
    pairs = [("post_layernorm", "post_layernorm")]
    for index in range(encoder.num_layers):
        pairs += [
            (f"layers.{index}.{part}", f"encoder.layers.{index}.{part}") for part in (*parts, "mlp.fc1", "mlp.fc2")
        ]
    for mine, published in pairs:
        for kind in ("weight", "bias"):
            yield rename(f"{ours}.{mine}.{kind}", f"{theirs}.{published}.{kind}")
