"""LoRA by PEFT on banks: which parameters an adapter goes on, and how it is kept to some of the towers.

PEFT adapts a bank ``(G, out, in)`` by a low-rank update a copy, all in one pair of factors. To keep an adapter to some
copies, both factors of the others are set to zero: their update is exactly zero then, and so is the gradient of either
factor, since it is a product with the other one. Nothing needs to be remembered: training leaves these zeros alone, a
saved adapter holds them, and merging adds them. PEFT itself enters where an adapter is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omnimoe.experts import FeedForward, RoutedExperts, RoutedProjections
from omnimoe.layers import BankLinear, BankMLP, ExpertLinear
from omnimoe.layers.uneven import Uneven
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.quantize import is_quantized
from omnimoe.routers import ByModalityRouter, Router, SoftRouter, StaticRouter

DEFAULT_SITES = ("attention", "experts")
_GROUPS = {"self_attn": "attention", "mlp": "experts"}
_Keys = tuple[frozenset[int], ...]
"""The keys whose rows may meet each copy."""


@dataclass(frozen=True)
class _Site:
    """A place for an adapter.

    Args:
        name: of the parameter, or of the linear layer.
        labels: what ``sites`` may call it.
        keys: the keys whose rows may meet each copy.
        is_parameter: False for a plain linear layer, which PEFT adapts as a module.
        is_quantized: its numbers are held in another form.
    """

    name: str
    labels: frozenset[str]
    keys: _Keys
    is_parameter: bool
    is_quantized: bool = False

    def copies_of(self, towers: frozenset[int]) -> list[int]:
        """The copies that no key outside of ``towers`` meets."""
        return [copy for copy, keys in enumerate(self.keys) if keys and keys <= towers]


def lora_targets(
    model: nn.Module, *, towers: Iterable[str] | None = None, sites: Iterable[str] | None = None
) -> dict[str, Any]:
    """What PEFT's ``LoraConfig`` must be told about a model, as keyword arguments.

    Args:
        model: with or without heads, before adapters.
        towers: names of keys, which are the modalities unless the config names others. Weights that rows of another key
            may meet are left out. Where a bank also has copies of others, the adapter is made frozen
            (``inference_mode``), for :func:`confine_lora` to free it; :func:`add_lora` does both.
        sites: ``"attention"``, ``"experts"``, ``"router"``, ``"lm_head"``, ``"modalities"``, or a part's own name:
            ``"q_proj"``, ``"down_proj"``, ``"shared_experts"``. Attention and experts where None, never routers.

    Returns:
        ``target_modules``, ``target_parameters`` and, as said above, ``inference_mode``.

    Raises:
        ValueError: if a tower or a site is unknown, nothing is left, a bank is quantised, or the head is the embedding
            too.

    Example:
        >>> from omnimoe import load
        >>> lora_targets(load("mot_nano", device="meta", num_layers=1), sites=["q_proj"])
        {'target_modules': [], 'target_parameters': ['model.backbone.layers.0.self_attn.q_proj.weight']}
    """
    names = _listed(towers)
    chosen = _towers(_config(model), names)
    found = _chosen_sites(model, sites)
    kept = [site for site in found if site.copies_of(chosen)]
    if not kept:
        raise ValueError(
            f"rows of other towers meet every weight of the chosen sites ({found[0].name}, ...), so an adapter of "
            f"{', '.join(names or ())} alone has no place; leave towers out, or choose other sites"
        )
    frozen = [site.name for site in kept if site.is_quantized]
    if frozen:
        raise ValueError(
            f"{frozen[0]} is quantised, and an adapter of a bank is added to plain numbers; put the adapter on first, "
            "merge it and quantise then"
        )
    targets: dict[str, Any] = {
        "target_modules": [site.name for site in kept if not site.is_parameter],
        "target_parameters": [site.name for site in kept if site.is_parameter],
    }
    if any(len(site.copies_of(chosen)) < len(site.keys) for site in kept):
        targets["inference_mode"] = True
    return targets


@torch.no_grad()
def confine_lora(model: nn.Module, towers: Iterable[str], adapter_name: str = "default") -> None:
    """Keeps a fresh LoRA adapter to the copies that rows of ``towers`` alone meet, and lets it train.

    Args:
        model: what ``get_peft_model`` gave, or a model after ``add_adapter``.
        towers: as for :func:`lora_targets`.
        adapter_name: which adapter.

    Raises:
        ValueError: if a tower is unknown, there is no such adapter, or the adapter also goes on weights that rows of
            other keys meet.
    """
    from peft.tuners.lora.layer import LoraLayer

    names = _listed(towers)
    chosen = _towers(_config(model), names)
    layers: dict[str, LoraLayer] = {}
    for name, module in _base(model).named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            parameter = getattr(module, "parameter_name", "")
            layers[f"{_plain(name)}.{parameter}".rstrip(".")] = module
    if not layers:
        raise ValueError(f"the model has no LoRA adapter {adapter_name!r}; make one with get_peft_model or add_lora")
    known = {site.name: site for site in _sites(model)}
    kept = {name: known[name].copies_of(chosen) if name in known else [] for name in layers}
    shared = [name for name, copies in kept.items() if not copies]
    if shared:
        raise ValueError(
            f"the adapter {adapter_name!r} is also on {shared[0]}, which rows of other towers than "
            f"{', '.join(names)} meet; take its targets from lora_targets with the same towers"
        )
    for name, layer in layers.items():
        inner, outer = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        count = len(known[name].keys)
        if count > 1:
            others = [copy for copy in range(count) if copy not in kept[name]]
            # PEFT keeps the first factor (copies, rank, in) and the second (out, rank, copies), each folded to a matrix
            inner.unflatten(0, (count, -1))[others] = 0
            outer.unflatten(1, (-1, count))[..., others] = 0
        inner.requires_grad_(True)
        outer.requires_grad_(True)
    for module in _base(model).modules():
        # whole modules that train along, such as a new head
        kept_whole = getattr(module, "modules_to_save", None)
        if isinstance(kept_whole, nn.ModuleDict) and adapter_name in kept_whole:
            kept_whole[adapter_name].requires_grad_(True)
    model.peft_config[adapter_name].inference_mode = False


def add_lora(
    model: nn.Module,
    *,
    towers: Iterable[str] | None = None,
    sites: Iterable[str] | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> Any:
    """A PEFT model with a LoRA adapter on a model's banks, kept to ``towers`` where they are given.

    Args:
        model: with or without heads; it is changed, as by ``get_peft_model``.
        towers: as for :func:`lora_targets`.
        sites: as for :func:`lora_targets`.
        adapter_name: what PEFT calls the adapter.
        options: other arguments of ``LoraConfig``: ``r``, ``lora_alpha``, ``init_lora_weights``. ``task_type`` is
            ``"CAUSAL_LM"`` for a model with heads.

    Returns:
        ``peft.PeftModel``, ready for training: the adapter alone has gradients.

    Raises:
        ImportError: if PEFT is not installed.
        ValueError: as :func:`lora_targets`, or if biases of every tower would be trained.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'omnimoe[peft]'") from error
    names = _listed(towers)
    if names is not None and options.get("bias", "none") != "none":
        raise ValueError(
            f"bias={options['bias']!r} trains the biases of every tower, and towers={names!r} keeps the others as they "
            "are; leave one of the two out"
        )
    # by the task PEFT's AutoPeftModelForCausalLM finds the class of the base
    task = {"task_type": "CAUSAL_LM"} if isinstance(model, OmniMoeForCausalLM) else {}
    config = LoraConfig(**{**lora_targets(model, towers=names, sites=sites), **task, **options})
    adapted = get_peft_model(model, config, adapter_name=adapter_name)
    if names is not None:
        confine_lora(adapted, names, adapter_name)
    return adapted


def _config(model: nn.Module) -> OmniMoeConfig:
    config = getattr(_base(model), "config", None)
    if not isinstance(config, OmniMoeConfig):
        raise ValueError(f"a model of omnimoe is needed, got {type(model).__name__}")
    return config


def _base(model: nn.Module) -> nn.Module:
    """The model under PEFT's own wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _listed(names: Iterable[str] | None) -> Any:
    """Names that can be read twice; a single string stays one, to be refused."""
    return names if names is None or isinstance(names, str) else list(names)


def _towers(config: OmniMoeConfig, names: Iterable[str] | None) -> frozenset[int]:
    known = config.keys or config.modality_names
    if names is None:
        return frozenset(range(len(known)))
    if isinstance(names, str) or not (given := list(names)):
        raise ValueError(f"towers must be a list of names out of {', '.join(known)}, got {names!r}")
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"unknown tower {unknown[0]!r}; the keys of this model are {', '.join(known)}")
    return frozenset(known.index(name) for name in given)


def _chosen_sites(model: nn.Module, sites: Iterable[str] | None) -> list[_Site]:
    found = list(_sites(model))
    known = {label for site in found for label in site.labels}
    wanted = known & set(DEFAULT_SITES) if sites is None else sites
    if isinstance(wanted, str) or not (wanted := set(wanted)):
        raise ValueError(f"sites must be a list of names out of {', '.join(sorted(known))}, got {sites!r}")
    unknown = sorted(wanted - known)
    if unknown:
        raise ValueError(f"unknown site {unknown[0]!r}; the sites of this model are {', '.join(sorted(known))}")
    chosen = [site for site in found if site.labels & wanted]
    if _config(model).tie_word_embeddings and any("lm_head" in site.labels for site in chosen):
        raise ValueError(
            "lm_head is the embedding too (tie_word_embeddings), and an adapter that is merged would change both; "
            "leave it out, or adapt a model that was made with tie_word_embeddings=False"
        )
    return chosen


def _sites(model: nn.Module) -> Iterator[_Site]:
    """Every place for an adapter, in the order of the model; adapters that are there already are seen through."""
    config, base = _config(model), _base(model)
    every: _Keys = (frozenset(range(len(config.keys or config.modality_names))),)
    modules = {_plain(name): module for name, module in base.named_modules() if not _is_adapter(name)}
    owners = _owners(modules, every[0])
    for name, module in modules.items():
        labels = _labels(name, modules)
        if not labels:
            continue
        if isinstance(module, nn.Linear):
            yield _Site(name, labels, _keys_of_linear(name, config, every), is_parameter=False)
        elif isinstance(module, BankLinear | BankMLP) or "router" in labels:
            for parameter, value in module.named_parameters(recurse=False):
                if value.ndim == 3 or (value.ndim == 2 and "router" in labels):
                    keys = owners.get(name, every * len(value)) if value.ndim == 3 else every
                    own = labels if parameter == "weight" else labels | {parameter}
                    yield _Site(f"{name}.{parameter}", own, keys, is_parameter=True, is_quantized=is_quantized(value))


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _labels(name: str, modules: dict[str, nn.Module]) -> frozenset[str]:
    """What ``sites`` may call a module; nothing where no adapter goes."""
    parts = name.split(".")
    if any(isinstance(modules.get(".".join(parts[:end])), Router) for end in range(1, len(parts) + 1)):
        return frozenset({"router"})
    if parts[-1] == "lm_head":
        return frozenset({"lm_head"})
    for place, part in enumerate(parts):
        if part == "layers" and place + 2 < len(parts) and parts[place + 2] in _GROUPS:
            inside = parts[place + 3 :]
            return frozenset({_GROUPS[parts[place + 2]], *(word for word in inside if not word.isdigit())})
        if part == "modalities" and place + 1 < len(parts):
            return frozenset({"modalities", parts[place + 1]})
    return frozenset()


def _keys_of_linear(name: str, config: OmniMoeConfig, every: _Keys) -> _Keys:
    parts = name.split(".")
    if "modalities" in parts and not config.keys:
        return (frozenset({config.modality_names.index(parts[parts.index("modalities") + 1])}),)
    return every


def _owners(modules: dict[str, nn.Module], every: frozenset[int]) -> dict[str, _Keys]:
    """The keys that may meet each copy of a bank, by the bank's name; a bank that is not named is open to all."""
    found: dict[str, _Keys] = {}
    for name, module in modules.items():
        if isinstance(module, BankLinear) and not isinstance(module, ExpertLinear):
            found[name] = _by_copy([(copy,) for copy in module.towers])
        elif isinstance(module, FeedForward):
            found[f"{name}.experts"] = _by_copy([(copy,) for copy in module.towers])
        elif isinstance(module, RoutedProjections):
            keys = _keys_of_experts(module.router, module.num_experts, every)
            keys += (every,) * module.declared.num_shared_experts
            found |= {f"{name}.{site}": keys for site in module.declared.experts_at}
        elif isinstance(module, RoutedExperts):
            found[f"{name}.experts"] = _keys_of_experts(module.router, module.num_experts, every)
            if module.config.pools:
                whole, first = found.pop(f"{name}.experts"), 0
                for pool, (count, _) in enumerate(module.config.pools):
                    found[f"{name}.experts.pools.{pool}"] = whole[first : first + count]
                    first += count
    for name, module in modules.items():
        if isinstance(module, Uneven):
            for copy, keys in enumerate(_by_copy([(copy,) for copy in module.towers])):
                found[f"{name}.copies.{copy}"] = (keys,)
    return found


def _keys_of_experts(router: Router, num_experts: int, every: frozenset[int]) -> _Keys:
    """The keys that may meet each expert under a router."""
    if isinstance(router, StaticRouter):
        return _by_copy(router.experts_of_keys, num_experts)
    counts = router.config.experts if isinstance(router, ByModalityRouter | SoftRouter) else ()
    if counts:
        return tuple(frozenset({key}) for key, count in enumerate(counts) for _ in range(count))
    return (every,) * num_experts


def _by_copy(copies: Sequence[tuple[int, ...]], count: int = 0) -> _Keys:
    """The copies of each key turned around: the keys of each copy."""
    count = max(count, 1 + max(copy for chosen in copies for copy in chosen))
    return tuple(frozenset(key for key, chosen in enumerate(copies) if copy in chosen) for copy in range(count))
