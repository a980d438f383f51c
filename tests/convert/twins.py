"""A family made for the tests, laid out as awkwardly as real ones: towers by suffix, fused rows, files of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from omnimoe import Attention, FeedForward, OmniMoeConfig, OmniMoeForCausalLM, Tokens
from omnimoe.convert import Converter, Deinterleave, Rows, Rule, Transpose, bank, rename

TOWERS = ("", "_gen")
FILES = {"llm_config.json": {"width": 16, "depth": 2, "heads": 2, "ffn": 24}, "picture_config.json": {"codes": 12}}


def twins_config(files) -> OmniMoeConfig:
    language, picture = files["llm_config.json"], files["picture_config.json"]
    return OmniMoeConfig(
        hidden_size=language["width"],
        num_layers=language["depth"],
        modalities=(
            Tokens.Config(name="text", vocab_size=20),
            Tokens.Config(name="image", vocab_size=picture["codes"]),
        ),
        attention=Attention.Config(num_heads=language["heads"], towers="modality", bias=True),
        experts=FeedForward.Config(intermediate_size=language["ffn"], towers="modality"),
        initializer_range=0.2,
    )


def twins_rules(config: OmniMoeConfig) -> Iterator[Rule]:
    width = config.hidden_size
    yield rename("model.embed_tokens.weight", "words.weight", "codes.weight")
    yield rename("lm_head.weight", "head.weight", change=Transpose())
    yield bank("model.norm.weight", "norm.weight")
    for index in range(config.num_layers):
        theirs, ours = f"blocks.{index}", f"model.backbone.layers.{index}"
        yield bank(f"{ours}.attention_norm.weight", f"{theirs}.norm1.weight")
        yield bank(f"{ours}.mlp_norm.weight", f"{theirs}.norm2.weight")
        for place, site in enumerate(("q_proj", "k_proj", "v_proj")):
            change = Deinterleave(width // config.attention.num_heads) if site != "v_proj" else Deinterleave(1)
            for kind in ("weight", "bias"):
                fused = [f"{theirs}.qkv{suffix}.{kind}" for suffix in TOWERS]
                rows = [Rows(name, place * width, (place + 1) * width) for name in fused]
                yield bank(f"{ours}.self_attn.{site}.{kind}", *rows, change=change)
        yield bank(f"{ours}.self_attn.o_proj.weight", *(f"{theirs}.out{suffix}.weight" for suffix in TOWERS))
        yield bank(
            f"{ours}.mlp.experts.gate_up_proj",
            *((f"{theirs}.gate{suffix}.weight", f"{theirs}.up{suffix}.weight") for suffix in TOWERS),
        )
        yield bank(f"{ours}.mlp.experts.down_proj", *(f"{theirs}.down{suffix}.weight" for suffix in TOWERS))


TWINS = Converter(
    name="twins",
    json_files=tuple(FILES),
    weight_files={"": "ema.safetensors", "picture.": "picture.safetensors"},
    config=twins_config,
    rules=twins_rules,
    ignored={r"picture\..*": "the decoder of pictures, a model of its own", r".*\.steps": "a counter"},
    optional={"tower that draws": r"blocks\.\d+\.\w+_gen\.\w+"},
)


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every published tensor of the family."""
    with torch.device("meta"):
        plan = TWINS.plan(OmniMoeForCausalLM(TWINS.config_of(FILES)))
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in plan.published.items()}


def write_twins(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """A published checkpoint of the family."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plain in FILES.items():
        (folder / name).write_text(json.dumps(plain), encoding="utf-8")
    (folder / "config.json").write_text('{"name": "twins",}', encoding="utf-8")  # as broken as one that was published
    save_file(random_tensors() if tensors is None else tensors, folder / "ema.safetensors")
    save_file({"decoder.weight": torch.ones(3)}, folder / "picture.safetensors")
    return folder
