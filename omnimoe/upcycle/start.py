"""From a seed to a new model: the config, the weights, and a report of both."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from omnimoe.backbone import LayerRange
from omnimoe.config import ConfigError
from omnimoe.freeze import freeze as freeze_names
from omnimoe.hub import MODELS, from_pretrained, load
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.quantize import is_quantized
from omnimoe.routers import Router
from omnimoe.tokenizers.adapters import quiet_transformers
from omnimoe.upcycle.report import UpcycledWeight, UpcycleReport, measure
from omnimoe.upcycle.sources import TABLES, Choices, Plan, plan_of
from omnimoe.upcycle.target import ExpertsAsked, Towers, origin_of, target_config
from omnimoe.upcycle.vocabulary import Added, Vocabulary, grown_table, lay_out, read_modalities

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = TABLES
Seed = OmniMoeForCausalLM | str | PathLike[str]


@overload
def upcycle(seed: Seed, *, return_report: Literal[False] = ..., **given: Any) -> OmniMoeForCausalLM: ...
@overload
def upcycle(seed: Seed, *, return_report: Literal[True], **given: Any) -> tuple[OmniMoeForCausalLM, UpcycleReport]: ...
def upcycle(
    seed: Seed,
    *,
    modalities: Added = (),
    keys: Iterable[str] = (),
    towers: Towers = None,
    experts: ExpertsAsked = None,
    router: Router.Config | None = None,
    layers: Iterable[LayerRange] = (),
    start_from: Mapping[str, str] | None = None,
    freeze: Iterable[str] = (),
    markers: str = "behind",
    tie: bool | None = None,
    rescale: bool = True,
    expert_noise: float = 0.0,
    router_noise: float = 0.01,
    row_noise: float = 0.1,
    rng_seed: int = 0,
    batch: Mapping[str, Any] | Tensor | None = None,
    return_report: bool = False,
    **changes: Any,
) -> OmniMoeForCausalLM | tuple[OmniMoeForCausalLM, UpcycleReport]:
    """A new, larger model that starts as a seed: with more modalities, with towers, with experts.

    What the seed computes is kept wherever the mathematics allows it; where it does not, a warning says so, and the
    report tells where and why.

    Args:
        seed: a model, which stays as it is; a name with weights, a folder, or an id on the Hub.
        modalities: those to add: ``{"image": 1000}``, codes by name, or configs. Rows of the vocabulary are added for
            codes, boundary tokens and placeholders.
        keys: names of the keys that pick copies, where they are not the modalities: ``("und", "gen")``.
        towers: a tower map for every site, ``"modality"`` or ``(0, 1, 1)``, or maps by site: ``"attention"``,
            ``"q_proj"`` and the others of its sites, ``"experts"``, ``"norm"``, ``"final_norm"``. Every copy starts as
            the one that its keys met in the seed. None leaves the seed's maps; keys that are new start as said below.
        experts: for each feed-forward network, or each pool of experts that the seed has: a number of copies in one
            pool for all keys, ``8``; numbers by key, ``{"text": 4, "image": 4}``; or a whole config of experts.
        router: of the experts. Where None the seed's, over all copies of what it chose; for experts that had none,
            token choice of two whose weights sum to one.
        layers: changes to ranges of layers of the new model.
        start_from: the key of the seed that a new key starts as, ``{"speech": "image"}``; its first where not named.
        freeze: keys whose weights stay, as for :func:`omnimoe.freeze`.
        markers: ``"behind"``, where every id of the seed stays what it was; or ``"front"``, with the sixteen markers of
            our tokenizers before them and ids moved up by sixteen, as ``hf_text`` numbers texts and our corpora want.
        tie: one matrix for embedding and head; as in the seed where None.
        rescale: where copies of a network get weights that do not sum to one, and no norm follows that divides it away,
            divide their last matrix by the mean of the sum.
        expert_noise: move copies of an expert apart by this share of their spread.
        router_noise: the same for the rows that a router has for copies of one expert.
        row_noise: a new row of embedding and head is the mean of the seed's, and this share of their spread of noise.
        rng_seed: of what is drawn; the global generator is left as it was.
        batch: ids for the seed, ``(B, T)``, or a mapping of what its forward takes: the two models are compared on it.
        return_report: return the report too.
        changes: other fields of the new config, such as ``mask``.

    Returns:
        The model in evaluation mode, in the dtype and on the device of the seed; with ``return_report`` also a
        :class:`UpcycleReport`.

    Raises:
        ConfigError: if what is asked for does not fit the seed, with what would.

    Example:
        >>> from omnimoe import Tokens, load
        >>> seed = load("smollm2_135m", num_layers=1, hidden_size=64, seed=0)
        >>> model = upcycle(seed, modalities={"image": 1000}, towers="modality", freeze=["text"])
        >>> model.config.modality_names, model.config.token_ranges["image"].start
        (('text', 'image'), 49154)

    Sources: towers as BAGEL, https://arxiv.org/abs/2505.14683, and LMFusion, https://arxiv.org/abs/2412.15188; experts
    as MoMa, https://arxiv.org/abs/2407.21770, and sparse upcycling, https://arxiv.org/abs/2212.05055.
    """
    held = _seed_of(seed)
    added, names, ranges = read_modalities(modalities), tuple(keys), tuple(layers)
    frozen = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    parts = (towers, experts, router, tie)
    if not (added or names or ranges or changes or markers != "behind" or any(part is not None for part in parts)):
        raise ConfigError("upcycle was asked for nothing new; name modalities, towers or experts")
    for name, noise in (("expert_noise", expert_noise), ("router_noise", router_noise), ("row_noise", row_noise)):
        if not 0 <= noise < float("inf"):
            raise ConfigError(f"{name} is a share and at least 0, got {noise}")
    vocabulary = lay_out(held.config, added, markers)
    origin = origin_of(held.config, vocabulary, names, start_from or {})
    config = target_config(
        held.config,
        vocabulary,
        origin,
        keys=names,
        towers=towers,
        experts=experts,
        router=router,
        layers=ranges,
        tie=tie,
        changes=changes,
    )
    _check_tie(held, config)
    base = held.config.name_or_path
    if base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists():
        config.card = {"base_model": base, **(config.card or {})}
    with torch.device("meta"):
        shape = OmniMoeForCausalLM(copy.deepcopy(config))
    choices = Choices(origin=origin, rescale=rescale, expert_noise=expert_noise, router_noise=router_noise)
    plan = plan_of(shape, held, [block.norm_placement for block in config.blocks], choices)
    with torch.random.fork_rng():
        torch.manual_seed(rng_seed)
        model = _built(held, config, plan, vocabulary, row_noise)
    model.generation_config = _generation_of(held, model, vocabulary)
    report = _report(held, shape, plan, vocabulary)
    if batch is not None:
        report = dataclasses.replace(report, measured=measure(held, model, vocabulary, batch))
    if frozen:
        freeze_names(model, frozen)
    logger.info("%s", report)
    if report.complaint:
        logger.warning("%s", report.complaint)
    return (model, report) if return_report else model


def _seed_of(seed: Seed) -> OmniMoeForCausalLM:
    if isinstance(seed, str | PathLike):
        is_name = isinstance(seed, str) and seed in MODELS and not Path(seed).is_dir()
        found = load(str(seed), pretrained=True) if is_name else from_pretrained(seed)
    else:
        found = seed
    if not isinstance(found, OmniMoeForCausalLM):
        raise ConfigError(f"a seed is a model of omnimoe or where one lies, got {type(seed).__qualname__}")
    quantised = next((name for name, held in found.named_parameters() if is_quantized(held)), None)
    if quantised is not None:
        raise ConfigError(f"{quantised} of the seed is quantised; take the seed as it was before")
    return found


def _check_tie(seed: OmniMoeForCausalLM, config: OmniMoeConfig) -> None:
    if not config.tie_word_embeddings or seed.config.tie_word_embeddings:
        return
    embedding, head = seed.get_input_embeddings().weight, seed.lm_head.weight
    if embedding.is_meta or not torch.equal(embedding, head):
        raise ConfigError("the seed's head is not its embedding, and tie=True would lose one of them; leave tie out")


def _built(
    seed: OmniMoeForCausalLM, config: OmniMoeConfig, plan: Plan, vocabulary: Vocabulary, row_noise: float
) -> OmniMoeForCausalLM:
    held, generator = seed.state_dict(), torch.Generator()
    generator.manual_seed(torch.initial_seed())
    weights = {name: start.make(held[start.key], generator) for name, start in plan.starts.items()}
    weights[EMBEDDING] = grown_table(held[EMBEDDING], vocabulary, noise=row_noise, generator=generator)
    if not config.tie_word_embeddings:
        grown = None if seed.config.tie_word_embeddings else held[HEAD]
        weights[HEAD] = (
            weights[EMBEDDING].clone()
            if grown is None
            else grown_table(grown, vocabulary, noise=row_noise, generator=generator)
        )
    device = held[EMBEDDING].device
    if device.type == "meta":
        with device:
            return OmniMoeForCausalLM._from_config(config, dtype=seed.dtype).eval()
    place: Any = {} if device.type == "cpu" else {"device_map": {"": device}}
    with quiet_transformers():  # what is new is told by the report
        model, report = OmniMoeForCausalLM.from_pretrained(
            None, config=config, state_dict=weights, dtype=seed.dtype, output_loading_info=True, **place
        )
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    model.name_or_path = model.config.name_or_path = ""  # it comes from no file
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, factor in plan.factors.items():
            parameters[name].mul_(factor)
    return model


def _generation_of(seed: OmniMoeForCausalLM, model: OmniMoeForCausalLM, vocabulary: Vocabulary) -> Any:
    settings = copy.deepcopy(seed.generation_config)
    for name, value in vocabulary.special.items():
        setattr(settings, name, value)
    return settings


def _report(seed: OmniMoeForCausalLM, shape: OmniMoeForCausalLM, plan: Plan, vocabulary: Vocabulary) -> UpcycleReport:
    weights = []
    for name, parameter in shape.named_parameters():
        start = plan.starts.get(name)
        source = None if start is None else start.key
        if name in TABLES:
            source = HEAD if name == HEAD and not seed.config.tie_word_embeddings else EMBEDDING
        copies = None if start is None else start.index
        weights.append(UpcycledWeight(name=name, source=source, copies=copies, numel=parameter.numel()))
    return UpcycleReport(
        weights=tuple(weights),
        changes=tuple(plan.changes),
        vocabulary=vocabulary,
        num_seed=sum(parameter.numel() for parameter in seed.parameters()),
    )
