"""The model card: a README.md that says what was saved, for people and for the Hub.

Numbers come from the model. What the model cannot know, its licence and its data, is read from ``config.card``, a
mapping that anybody may set: it is stored in ``config.json`` and so comes back with the model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimoe.config import ConfigError
from omnimoe.flops import UnknownCostError, active_params, flops
from omnimoe.modalities import Tokens
from omnimoe.model_config import OmniMoeConfig

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from transformers import PreTrainedModel

FACTS = {
    "license": "SPDX name of the licence of the weights",
    "license_name": "its name where it is none of the Hub's list",
    "license_link": "its address",
    "datasets": "ids of data sets on the Hub",
    "base_model": "id of the model that was started from",
    "language": "languages, as ISO codes",
    "data": "what the model was trained on, in a sentence",
    "paper": "address of the paper",
    "description": "what the model is, in a sentence or two",
}
"""What ``config.card`` may hold. The first six are fields of the Hub's own."""
_OF_THE_HUB = ("license", "license_name", "license_link", "datasets", "base_model", "language")

MARK = "<!-- Written by omnimoe at every save. Without this line the file is yours and stays as it is. -->"
README = "README.md"


def model_card(model: PreTrainedModel, name: str | None = None, *, tags: Iterable[str] = ()) -> ModelCard:
    """The card of a model.

    Args:
        model: any model of ours.
        name: how it is called and loaded: a folder or an id on the Hub; the model's own where None.
        tags: beside those that the model gives.

    Returns:
        A card whose ``data`` are the fields that the Hub reads and whose ``text`` is for people.

    Raises:
        ConfigError: if ``config.card`` holds what it cannot.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = model.config
    facts = _facts(config)
    name = name or model.name_or_path or "a-model-of-omnimoe"
    data = ModelCardData(
        library_name="omnimoe",
        pipeline_tag="text-generation" if config.modality_names == ("text",) else "any-to-any",
        tags=list(dict.fromkeys([*_tags(config), *tags])),
        **{field: facts[field] for field in _OF_THE_HUB if field in facts},
    )
    rows = "\n".join(f"| {label} | {value} |" for label, value in _table(model, facts).items())
    described = facts.get("description") or _sentence(config)
    text = f"""{MARK}

# {name.rpartition("/")[2]}

{described}

| | |
|---|---|
{rows}

## Loading

```python
from omnimoe import from_pretrained

model = from_pretrained({json.dumps(name)})
```
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def write_card(
    model: PreTrainedModel, folder: Path, *, name: str, held: str | None = None, tags: Iterable[str] = ()
) -> None:
    """Writes the card into a folder, unless it would take the place of one that somebody wrote by hand.

    Args:
        model: that is being saved.
        folder: where to write.
        name: how the model is loaded.
        held: the text of the README that the card would replace; None where there is none.
        tags: beside those that the model gives.
    """
    if is_ours(held):
        (folder / README).write_text(model_card(model, name, tags=tags).content, encoding="utf-8")


def text_of(path: Path) -> str | None:
    """What a README holds; None where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def is_ours(text: str | None) -> bool:
    """Whether a README may be replaced: there is none, or it is a card of ours that nobody claimed."""
    return text is None or MARK in text


def _facts(config: OmniMoeConfig) -> dict[str, Any]:
    facts = config.card
    if facts is None:
        return {}
    if not isinstance(facts, dict):
        raise ConfigError(f"config.card must be a mapping of {', '.join(FACTS)}, got {facts!r}")
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise ConfigError(f"config.card has unknown fields: {', '.join(map(str, unknown))}. Fields: {', '.join(FACTS)}")
    return facts


def _tags(config: OmniMoeConfig) -> list[str]:
    kinds = ["multimodal"] if len(config.modalities) > 1 else []
    kinds += ["mixture-of-transformers"] if _is_untied(config) else []
    kinds += ["moe"] if _is_routed(config) else []
    return ["omnimoe", *kinds, *config.modality_names]


def _is_untied(config: OmniMoeConfig) -> bool:
    return any(getattr(block.attention, "towers", "shared") != "shared" for block in config.blocks)


def _is_routed(config: OmniMoeConfig) -> bool:
    return any(hasattr(block.experts, "router") for block in config.blocks)


def _sentence(config: OmniMoeConfig) -> str:
    kind = "Mixture-of-Transformers" if _is_untied(config) else "transformer"
    with_experts = " with routed experts" if _is_routed(config) else ""
    *others, last = config.modality_names
    over = f"{', '.join(others)} and {last}" if others else last
    return (
        f"A {kind}{with_experts} over {over}: {config.num_layers} layers of width {config.hidden_size}. "
        "Made with omnimoe."
    )


def _table(model: PreTrainedModel, facts: dict[str, Any]) -> dict[str, str]:
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    active, per_token = "unknown", "unknown"
    with contextlib.suppress(UnknownCostError):
        by_modality = {name: active_params(config, name) for name in config.modality_names}
        shares = ", ".join(f"{name} {count:,}" for name, count in by_modality.items())
        active = f"{active_params(config):,}" + (f" ({shares})" if len(set(by_modality.values())) > 1 else "")
        counted = flops(model).per_token
        per_token = f"{counted:,.0f}, forward, in a sequence of {config.max_position_embeddings:,}"
    return {
        "parameters": f"{total:,}",
        "active a token": active,
        "FLOPs a token": per_token,
        "modalities": ", ".join(_modality(config, modality) for modality in config.modalities),
        **({"keys": ", ".join(config.keys)} if config.keys else {}),
        "longest sequence": f"{config.max_position_embeddings:,}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "licence": str(facts.get("license_name") or facts.get("license") or "not stated"),
        "data": str(facts.get("data") or "not stated"),
        **({"paper": str(facts["paper"])} if "paper" in facts else {}),
    }


def _modality(config: OmniMoeConfig, modality: Any) -> str:
    if isinstance(modality, Tokens.Config):
        held = config.token_ranges[modality.name]
        return f"{modality.name} (ids {held.start} to {held.stop - 1})"
    return f"{modality.name} ({'only in' if modality.is_input_only else 'continuous'})"
