"""The second stage of MoMa: auxiliary routers for a model that was trained without, trained alone and measured.

    model = omnimoe.add_auxiliary_routers(model)
    omnimoe.hold_all_but_auxiliary(model)
    ...  # train as before: nothing but the auxiliary routers moves
    omnimoe.set_auxiliary_thresholds(model, batches)
    for found in omnimoe.measure_auxiliary_routers(model, batches):
        print(found)

``omnimoe train --from RUN --stage auxiliary`` does all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omnimoe.backbone import LayerRange
from omnimoe.config import ConfigError
from omnimoe.freeze import Frozen, takes_nothing_in
from omnimoe.layers import RowLayout
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.model_config import OmniMoeConfig
from omnimoe.routers import AuxiliaryRouter, DepthRouter, ExpertChoiceRouter, Router


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """How well one auxiliary router foretells what its main router chooses.

    Args:
        layer: which.
        key: of the rows, where the router is of one key; None for all.
        kind: ``"experts"``, ``"attention"`` for those in its projections, or ``"depth"``.
        accuracy: share of the answers, one a row and choice, that are right.
        precision: share of what it takes that the main router takes.
        recall: share of what the main router takes that it takes.
        taken: choices a row.
        wanted: choices a row of the main router.
        exact: share of rows for which every answer is right.
    """

    layer: int
    key: str | None
    kind: str
    accuracy: float
    precision: float
    recall: float
    taken: float
    wanted: float
    exact: float

    def __str__(self) -> str:
        of = self.kind if self.key is None else f"{self.kind} of {self.key}"
        return (
            f"layer {self.layer}, {of}: accuracy {self.accuracy:.1%}, precision {self.precision:.1%}, recall "
            f"{self.recall:.1%}, {self.taken:.2f} choices a token for {self.wanted:.2f}"
        )


def add_auxiliary_routers(model: OmniMoeForCausalLM) -> OmniMoeForCausalLM:
    """The same model with an auxiliary router beside every router that looks at other rows.

    Weights are those of ``model``, shared with it; auxiliary routers that it has stay, and new ones start fresh. What
    the model gives without a cache does not change. With one it does, once they are trained; until then ``generate``
    refuses.

    Args:
        model: the model; it stays usable.

    Returns:
        The new one, in evaluation mode if ``model`` is.

    Raises:
        ConfigError: if no router looks at other rows, or one does that can have no auxiliary router.
    """
    config = with_auxiliary_routers(model.config)
    config.dtype, config._attn_implementation = model.config.dtype, model.config._attn_implementation
    if model.config.card is not None:
        config.card = dict(model.config.card)
    grown = OmniMoeForCausalLM(config)
    told = grown.load_state_dict(model.state_dict(), strict=False, assign=True)
    lost = [name for name in (*told.missing_keys, *told.unexpected_keys) if ".auxiliary." not in name]
    assert not lost, lost
    grown.tie_weights()
    for module in grown.modules():
        if isinstance(module, ExpertChoiceRouter | DepthRouter) and module.auxiliary is not None:
            like = module.scorer.weight
            module.auxiliary.to(device=like.device, dtype=like.dtype)
    grown.generation_config = copy.deepcopy(model.generation_config)
    return grown.train(model.training)


def with_auxiliary_routers(config: OmniMoeConfig) -> OmniMoeConfig:
    """The config of such a model; see :func:`add_auxiliary_routers`."""
    parts = {"attention": _of_part(config.attention), "experts": _of_part(config.experts)}
    new = config.replace(**parts, layers=tuple(map(_of_range, config.layers)))
    stuck = [layer for layer, block in enumerate(new.blocks) if not block.has_causal_form]
    if stuck:
        block = new.blocks[stuck[0]]
        part = block.experts if not block.experts.has_causal_form else block.attention
        raise ConfigError(
            f"{type(part).__qualname__} in layers {', '.join(map(str, stuck))} has no form that routes a token by "
            "itself, so auxiliary routers would not make the model generate; take another part there"
        )
    parts_of = [(block.attention, block.experts) for block in new.blocks]
    has_depth = any(block.depth is not None and not block.depth.is_causal for block in new.blocks)
    if not has_depth and not any(_has_auxiliary(part) for parts in parts_of for part in parts):
        raise ConfigError(
            "no router of this model chooses by looking at other rows, as expert choice and a mixture of depths do; it "
            "needs no auxiliary ones"
        )
    return new


def _of_range(held: LayerRange) -> LayerRange:
    depth = held.depth
    if depth is not None and not depth.is_causal:
        depth = depth.replace(causal_form="auxiliary")
    return held.replace(attention=_of_part(held.attention), experts=_of_part(held.experts), depth=depth)


def _of_part(part: Any) -> Any:
    """The config of a part or of a router with auxiliary ones inside; what has none stays as it is."""
    if isinstance(part, ExpertChoiceRouter.Config):
        return part if part.is_causal else part.replace(causal_form="auxiliary")
    inner = getattr(part, "router", None)
    return part if inner is None else part.replace(router=_of_part(inner))


def _has_auxiliary(part: Any) -> bool:
    if isinstance(part, ExpertChoiceRouter.Config):
        return part.causal_form == "auxiliary"
    inner = getattr(part, "router", None)
    return inner is not None and _has_auxiliary(inner)


def hold_all_but_auxiliary(model: nn.Module, *, with_bias: bool = True) -> Frozen:
    """Keeps every weight but those of auxiliary routers, and what routers adapt outside of the gradient.

    :func:`omnimoe.unfreeze` undoes it. Train in evaluation mode, so that what they learn to foretell is the choice
    without the noise that some routers have in training.

    Args:
        model: changed in place.
        with_bias: train a bias, which sets the threshold; else it is taken away, as MoMa has it.

    Returns:
        What stays and what is trained.

    Raises:
        ConfigError: if it has no auxiliary routers; the model is as before then.
    """
    parameters = dict(model.named_parameters())
    trained = {name for name in parameters if ".auxiliary." in name}
    if not trained:
        raise ConfigError("this model has no auxiliary routers; make it omnimoe.add_auxiliary_routers(model) first")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    for module in model.modules():
        if isinstance(module, Router):
            module.update = takes_nothing_in  # type: ignore[method-assign]
        elif isinstance(module, AuxiliaryRouter) and not with_bias:
            module.drop_bias()
    count = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters.values())
    return Frozen(names=("all but auxiliary routers",), kept=total - count, trained=count, partly=())


@torch.no_grad()
def measure_auxiliary_routers(
    model: OmniMoeForCausalLM, batches: Iterable[dict[str, Tensor]], *, precision: str = "fp32"
) -> list[Foretold]:
    """Compares what auxiliary routers say of each row with what the main ones choose, batch by batch.

    Args:
        model: with auxiliary routers; its training mode is put back as it was.
        batches: inputs of the model.
        precision: ``"bf16"`` for autocast.

    Returns:
        One record a router, in order of layers; those that saw no row are left out.
    """
    sums: dict[str, Tensor] = {}

    def compare(path: str, module: Any, x: Tensor, wanted: Tensor) -> None:
        """Adds rows, answers of both routers, what both take, what they agree on, rows that they agree on wholly."""
        found = module.auxiliary.takes(x)
        both, right = found & wanted, found == wanted
        counts = (len(x), found.sum(), wanted.sum(), both.sum(), right.sum(), right.all(-1).sum())
        new = torch.stack([torch.as_tensor(count, device=x.device).double() for count in counts])
        sums[path] = sums[path] + new if path in sums else new

    _watch(model, batches, precision, compare)
    keys = tuple(model.config.keys or model.config.modality_names)
    paths = [path for path, _ in model.named_modules() if path in sums]
    return [_record(path, sums[path].tolist(), keys) for path in paths if sums[path][0]]


@torch.no_grad()
def set_auxiliary_thresholds(
    model: OmniMoeForCausalLM, batches: Iterable[dict[str, Tensor]], *, precision: str = "fp32"
) -> None:
    """Moves the threshold of each auxiliary router, so that over some batches it takes as many rows as the main one.

    One that is trained to be right on each row may still take too many or too few; a layer chosen by depth suffers.
    ``omnimoe train --stage auxiliary`` does this at its end.

    Args:
        model: with trained auxiliary routers, changed in place; its training mode is put back as it was.
        batches: inputs of the model, of its training data.
        precision: ``"bf16"`` for autocast.
    """
    logits: dict[nn.Module, list[Tensor]] = {}
    counts: dict[nn.Module, Tensor] = {}

    def look(path: str, module: Any, x: Tensor, wanted: Tensor) -> None:
        logits.setdefault(module, []).append(module.auxiliary(x))
        counts[module] = counts.get(module, torch.zeros((), device=x.device)) + wanted.sum(0)

    _watch(model, batches, precision, look)
    for module, parts in logits.items():
        ranked = torch.cat(parts).sort(dim=0, descending=True).values
        if len(ranked) > 1:
            # between the last that is wanted and the next; equal rows, as the first layer has, stay together
            place = counts[module].long().clamp(1, len(ranked) - 1).unsqueeze(0)
            border = (ranked.gather(0, place - 1) + ranked.gather(0, place)).squeeze(0) / 2
            module.auxiliary.outer.bias -= border.to(module.auxiliary.outer.bias.dtype)


def _watch(
    model: OmniMoeForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    precision: str,
    look: Callable[[str, Any, Tensor, Tensor], None],
) -> None:
    """Shows ``look`` each router that has an auxiliary one, by name, its rows, and ``(N, E)`` bool, what it chose."""

    def hook(path: str, module: Any, given: tuple[Tensor, RowLayout], out: Any) -> None:
        x = given[0]
        wanted = torch.zeros(len(x), module.auxiliary.outer.weight.shape[0], dtype=torch.bool, device=x.device)
        if isinstance(module, DepthRouter):
            wanted[out[0]] = True
        else:
            is_choice = out.expert_ids >= 0
            wanted[out.token_index[is_choice], out.expert_ids[is_choice]] = True
        look(path, module, x, wanted)

    handles = [
        module.register_forward_hook(partial(hook, path))
        for path, module in model.named_modules()
        if isinstance(module, ExpertChoiceRouter | DepthRouter) and module.auxiliary is not None
    ]
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for batch in batches:
                model(**{name: value.to(device) for name, value in batch.items() if name != "labels"}, logits_to_keep=1)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _record(path: str, total: list[float], keys: tuple[str, ...]) -> Foretold:
    rows, found, wanted, both, right, whole = total
    layer = int(path.partition(".layers.")[2].partition(".")[0])
    above, _, last = path.rpartition(".routers.")
    is_depth = path.endswith(".depth")
    answers = right + found + wanted - 2 * both
    return Foretold(
        layer=layer,
        key=keys[int(last)] if above and last.isdigit() else None,
        kind="depth" if is_depth else "attention" if ".self_attn." in path else "experts",
        accuracy=right / answers,
        precision=both / found if found else 0.0,
        recall=both / wanted if wanted else 0.0,
        taken=found / rows,
        wanted=wanted / rows,
        exact=whole / rows,
    )


__all__ = [
    "Foretold",
    "add_auxiliary_routers",
    "hold_all_but_auxiliary",
    "measure_auxiliary_routers",
    "set_auxiliary_thresholds",
    "with_auxiliary_routers",
]
