"""What auxiliary routers cost: perplexity with them beside that of the training router, and how well they foretell.

MoMa and its sister with a mixture of depths are trained by the batch's choice; then, with all else frozen, auxiliary
routers are trained to foretell that choice. Held-out perplexity follows in several forms: by the batch's choice and by
auxiliary routers, and, to find what the difference is made of, with thresholds set so that each router takes as many
rows as its main one does, by a threshold on the main router's own score (which errs only where batches differ), with as
many errors as auxiliary routers make drawn at random, and with a batch of one sequence. A run that was broken off goes
on with the stage it was in; one that is finished is measured again.

    python benchmarks/auxiliary_routers.py --size micro --out result.json --work runs
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import omnimoe
from omnimoe import (
    LayerRange,
    OmniMoeForCausalLM,
    RoutedExperts,
    add_auxiliary_routers,
    from_pretrained,
    load,
    set_auxiliary_thresholds,
)
from omnimoe import measure_auxiliary_routers as measure
from omnimoe.data import Corpus
from omnimoe.routers import ByModalityRouter, DepthRouter, ExpertChoiceRouter
from omnimoe.routers.auxiliary import AuxiliaryRouter
from omnimoe.train import Training, TrainSettings, evaluate

DEPTH = LayerRange(step=2, depth=DepthRouter.Config(capacity=0.25, pool="batch"))
"""Every second layer from the first, on a quarter of the rows of the batch, as in MoMa."""
SISTERS: dict[str, tuple[LayerRange, ...]] = {"moma": (), "moma+depth": (DEPTH,)}


def declared(size: str, sister: str, gumbel: float, seed: int) -> OmniMoeForCausalLM:
    """Four experts of full width for each modality, each of which takes a quarter of its rows."""
    dense = load(f"dense_{size}", device="meta").config
    choice = ExpertChoiceRouter.Config(gumbel_noise=gumbel)
    experts = RoutedExperts.Config(
        num_experts=12,
        intermediate_size=dense.experts.intermediate_size,
        router=ByModalityRouter.Config(experts=(4, 4, 4), router=choice),
    )
    return load(f"dense_{size}", seed=seed, experts=experts, layers=SISTERS[sister])


def stage(
    model: Callable[[], OmniMoeForCausalLM],
    settings: TrainSettings,
    corpus: Corpus,
    out: Path,
    *,
    until: int,
    seed: Path | None = None,
) -> Training:
    """A run to a step, from where it was broken off; one that came so far is read."""
    folder = out / "checkpoint"
    run = Training(from_pretrained(folder) if folder.is_dir() else model(), settings, corpus=corpus, out=out)
    if folder.is_dir():
        run.resume()
    elif seed is not None:
        run.follow(seed / "checkpoint")
    if run.step < until:
        run.run(until=until)
    return run


Chooser = Callable[..., Any]


@contextmanager
def decided(
    model: nn.Module,
    experts: Callable[[ExpertChoiceRouter], Chooser] | None = None,
    depth: Callable[[DepthRouter], Chooser] | None = None,
) -> Iterator[None]:
    """Lets others than auxiliary routers decide in the causal form, where they are given."""
    changed: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, ExpertChoiceRouter) and experts is not None:
            changed.append((module, "_alone"))
            setattr(module, "_alone", experts(module))  # noqa: B010 - types of methods
        elif isinstance(module, DepthRouter) and depth is not None:
            changed.append((module, "alone"))
            setattr(module, "alone", depth(module))  # noqa: B010
    try:
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def by_batch(router: ExpertChoiceRouter, errors: float = 0.0) -> Chooser:
    """Each expert's best rows, but for a share of all answers that are turned at random, as many either way."""

    def best(x: Tensor, scores: Tensor) -> Tensor:
        count = min(len(scores), math.ceil(router.config.capacity_factor / router.num_experts * len(scores)))
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(0, scores.topk(count, dim=0).indices, True)
        return taken ^ _drawn(taken, errors)

    return best


def _drawn(taken: Tensor, errors: float) -> Tensor:
    """Answers to turn: half of the errors among those that are yes."""
    share = taken.float().mean(0).clamp(1e-6, 1 - 1e-6)
    rate = torch.where(taken, errors / 2 / share, errors / 2 / (1 - share))
    return torch.rand_like(rate) < rate


def depth_by_batch(router: DepthRouter, errors: float = 0.0) -> Chooser:
    """The best rows of the batch, with errors at random."""

    def best(x: Tensor) -> tuple[Tensor, Tensor]:
        taken = torch.zeros(len(x), 1, dtype=torch.bool)
        taken[router(x, None)[0]] = True  # a pool of the batch asks for no layout
        index = (taken ^ _drawn(taken, errors)).squeeze(1).nonzero().squeeze(1)
        return index, router.scorer(x[index]).squeeze(1).sigmoid().to(x.dtype)

    return best


def by_threshold(thresholds: dict[nn.Module, Tensor], router: ExpertChoiceRouter) -> Chooser:
    """Rows whose score reaches a fixed number."""
    return lambda x, scores: scores >= thresholds[router]


def lowest_taken(model: OmniMoeForCausalLM, batches: list[dict[str, Tensor]]) -> dict[nn.Module, Tensor]:
    """The lowest score that each expert took, as a mean over batches, by router; the running one where it took none."""
    found: dict[nn.Module, list[Tensor]] = {}

    def look(module: Any, given: Any, out: Any) -> None:
        if out.cutoff is not None:
            found[module].append(out.cutoff)

    handles = []
    for module in model.modules():
        if isinstance(module, ExpertChoiceRouter):
            found[module] = []
            handles.append(module.register_forward_hook(look))
    evaluate(model, batches)
    for handle in handles:
        handle.remove()
    return {
        module: torch.stack(parts).nanmean(0) if parts else module.get_buffer("cutoff")
        for module, parts in found.items()
    }


def measured(run: Training, num_tuning: int) -> dict[str, Any]:
    """Losses in every form, and the agreement of auxiliary and main routers."""
    model, batches = run.model.eval(), run.held_out
    tuning = [next(run.batches) for _ in range(num_tuning)]
    lowest = lowest_taken(model, tuning)
    agreement = {"held out": measure(model, batches), "training data": measure(model, tuning)}
    errors = {
        kind: statistics.mean([1 - one.accuracy for one in agreement["held out"] if one.kind == kind] or [0.0])
        for kind in ("experts", "depth")
    }
    has_depth = bool(errors["depth"])
    batched = partial(depth_by_batch) if has_depth else None
    losses = {
        "batch": evaluate(model, batches),
        "batch of one sequence": evaluate(model, [one for batch in batches for one in sequences(batch)]),
        "auxiliary": evaluate(model, batches, is_causal=True),
    }
    others: dict[str, tuple[Any, Any]] = {
        "running cut-off": (lambda router: by_threshold({router: router.cutoff}, router), batched),
        "cut-off of training data": (partial(by_threshold, lowest), batched),
        "errors at random": (
            partial(by_batch, errors=errors["experts"]),
            partial(depth_by_batch, errors=errors["depth"]),
        ),
    }
    if has_depth:
        others |= {
            "auxiliary, experts alone": (None, batched),
            "auxiliary, depth alone": (by_batch, None),
            "errors in depth at random": (by_batch, partial(depth_by_batch, errors=errors["depth"])),
        }
    for name, (experts, depth) in others.items():
        with decided(model, experts, depth):
            losses[name] = evaluate(model, batches, is_causal=True)
    set_auxiliary_thresholds(model, tuning)
    losses["auxiliary, thresholds set"] = evaluate(model, batches, is_causal=True)
    agreement["held out, thresholds set"] = measure(model, batches)
    return {"losses": losses, "routers": {name: list(map(asdict, found)) for name, found in agreement.items()}}


def sequences(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row of a batch as a batch."""
    return [{name: held[row : row + 1] for name, held in batch.items()} for row in range(len(batch["input_ids"]))]


def told(name: str, result: dict[str, Any]) -> str:
    """A table of perplexities, each beside that of the batch's choice, and the routers' means."""
    whole = result["losses"]["batch"]
    lines = [f"{name:<28}" + "".join(f"{modality:>20}" for modality in whole)]
    for form, losses in result["losses"].items():
        cells = "".join(f"{math.exp(losses[m]):>11.2f} {math.expm1(losses[m] - whole[m]):>+8.2%}" for m in whole)
        lines.append(f"{form:<28}{cells}")
    for title, found in result["routers"].items():
        for kind in ("experts", "depth"):
            own = [one for one in found if one["kind"] == kind]
            if own:
                names = ("accuracy", "precision", "recall", "taken", "wanted")
                means = {name: statistics.mean(one[name] for one in own) for name in names}
                lines.append(f"{kind}, {title}: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Both stages of each sister, the table, and the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="micro", help="of the dense model it is made from: nano, micro")
    parser.add_argument("--sisters", nargs="+", choices=SISTERS, default=list(SISTERS))
    parser.add_argument("--data", default="p")
    parser.add_argument("--steps", type=int, default=400, help="of the first stage")
    parser.add_argument("--auxiliary-steps", type=int, default=200, help="of the second")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--auxiliary-lr", type=float, default=2e-3)
    parser.add_argument("--gumbel", type=float, default=0.0, help="noise of the first stage")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--evaluate-batches", type=int, default=8)
    parser.add_argument("--tuning-batches", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder that the runs are kept in")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    corpus = Corpus.load(args.data)
    shared = TrainSettings(
        data=args.data,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        precision=args.precision,
        evaluate_batches=args.evaluate_batches,
        evaluate_every=0,
        save_every=100,
        keep=1,
        seed=args.seed,
    )
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {name: str(held) if isinstance(held, Path) else held for name, held in vars(args).items()},
        "omnimoe": omnimoe.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "corpus": corpus.meta["rows_sha256"][:12],
    }
    # a sister that was measured before stays in the file
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out is not None and args.out.exists() else {}
    for sister in args.sisters:
        folder = args.work / sister
        fresh = partial(declared, args.size, sister, args.gumbel, args.seed)
        first = shared.replace(steps=args.steps, learning_rate=args.lr, warmup=min(50, args.steps))
        trained = stage(fresh, first, corpus, folder / "first", until=args.steps)
        second = shared.replace(
            steps=args.auxiliary_steps + 1,  # with its last step a run sets thresholds, which is measured apart
            learning_rate=args.auxiliary_lr,
            warmup=min(20, args.auxiliary_steps),
            stage="auxiliary",
        )
        with_routers = partial(add_auxiliary_routers, trained.model)
        run = stage(with_routers, second, corpus, folder / "second", until=args.auxiliary_steps, seed=folder / "first")
        result[sister] = facts | measured(run, args.tuning_batches)
        result[sister] |= {
            "first": trained.history.to_dict(),
            "second": run.history.to_dict(),
            "auxiliary_params": sum(
                held.numel()
                for module in run.model.modules()
                if isinstance(module, AuxiliaryRouter)
                for held in module.parameters()
            ),
        }
        print(told(sister, result[sister]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
