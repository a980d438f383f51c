"""What auxiliary routers cost: perplexity with them beside that of the training router, and how well they foretell.

MoMa and its sister with a mixture of depths are trained by the batch's choice; then, with all else frozen, auxiliary
routers are trained to foretell that choice. Held-out perplexity follows in four forms: by the batch's choice, by
auxiliary routers, by auxiliary routers whose thresholds were set so that each takes as many rows as its main router
does, and, where there is one, by the running cut-off. What the difference is made of is measured beside it. A run that
was broken off goes on with the stage it was in.

    python benchmarks/auxiliary_routers.py --size micro --out result.json --work runs
"""

from __future__ import annotations

import argparse
import json
import math
import platform
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
from omnimoe import LayerRange, OmniMoeForCausalLM, RoutedExperts, add_auxiliary_routers, from_pretrained, load
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
    seed: Path | None = None,
) -> Training:
    """A run to its end, from where it was broken off; one that is finished is read."""
    folder = out / "checkpoint"
    run = Training(from_pretrained(folder) if folder.is_dir() else model(), settings, corpus=corpus, out=out)
    if folder.is_dir():
        run.resume()
    elif seed is not None:
        run.follow(seed / "checkpoint")
    if run.step < settings.steps:
        run.run()
    return run


# Who decides what a row meets in the causal form: the auxiliary routers, the running cut-off, or still the whole batch.
FORMS = {
    "auxiliary": ("auxiliary", "auxiliary"),
    "auxiliary experts alone": ("auxiliary", "batch"),
    "auxiliary depth alone": ("batch", "auxiliary"),
    "cutoff": ("cutoff", "batch"),
}


@contextmanager
def decided(model: nn.Module, experts: str, depth: str) -> Iterator[None]:
    """Lets others than auxiliary routers decide in the causal form."""
    changed: list[Any] = []
    for module in model.modules():
        if isinstance(module, ExpertChoiceRouter) and experts != "auxiliary":
            module._alone = _by_cutoff(module) if experts == "cutoff" else _by_batch(module)  # type: ignore[assignment]
            changed.append((module, "_alone"))
        elif isinstance(module, DepthRouter) and depth != "auxiliary":
            module.alone = _whole(module)  # type: ignore[method-assign]
            changed.append((module, "alone"))
    try:
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def _by_cutoff(router: ExpertChoiceRouter) -> Callable:
    return lambda x, scores: scores >= router.cutoff


def _by_batch(router: ExpertChoiceRouter) -> Callable:
    def best(x: Tensor, scores: Tensor) -> Tensor:
        share = router.config.capacity_factor / router.num_experts
        index = scores.topk(min(len(scores), math.ceil(share * len(scores))), dim=0).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(0, index, True)

    return best


def _whole(router: DepthRouter) -> Callable:
    return lambda x: router(x, None)  # a pool of the batch asks for no layout


@contextmanager
def calibrated(model: OmniMoeForCausalLM, batches: list[dict[str, Tensor]]) -> Iterator[None]:
    """Moves each auxiliary router's thresholds so that over some batches it takes as many rows as the main one."""
    seen: dict[str, tuple[list[Tensor], list[int]]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, ExpertChoiceRouter | DepthRouter):
            logits, counts = seen.setdefault(path, ([], []))

            def look(module: Any, given: Any, out: Any, logits: list = logits, counts: list = counts) -> None:
                logits.append(module.auxiliary(given[0]))
                chosen = len(out[0]) if isinstance(module, DepthRouter) else int((out.expert_ids >= 0).sum())
                counts.append(chosen // logits[-1].shape[1])

            handles.append(module.register_forward_hook(look))
    evaluate(model, batches)
    for handle in handles:
        handle.remove()
    outers = []
    for path, (logits, counts) in seen.items():
        ranked = torch.cat(logits).sort(dim=0, descending=True).values
        outer = model.get_submodule(f"{path}.auxiliary.outer")
        outer.bias = nn.Parameter(-ranked[min(sum(counts), len(ranked) - 1)])
        outers.append(outer)
    try:
        yield
    finally:
        for outer in outers:
            outer.bias = None


def measured(run: Training, num_tuning: int) -> dict[str, Any]:
    """Losses in every form, and the agreement of auxiliary and main routers."""
    model, batches = run.model.eval(), run.held_out
    tuning = [next(run.batches) for _ in range(num_tuning)]
    found: dict[str, Any] = {"losses": {"batch": evaluate(model, batches)}}
    found["losses"]["batch of one sequence"] = evaluate(model, [one for batch in batches for one in sequences(batch)])
    has_depth = any(isinstance(module, DepthRouter) for module in model.modules())
    for name, (experts, depth) in FORMS.items():
        if has_depth or name in ("auxiliary", "cutoff"):
            with decided(model, experts, depth):
                found["losses"][name] = evaluate(model, batches, is_causal=True)
    found["routers"] = [asdict(one) for one in measure(model, batches)]
    found["routers on training data"] = [asdict(one) for one in measure(model, tuning)]
    with calibrated(model, tuning):
        found["losses"]["auxiliary, thresholds set"] = evaluate(model, batches, is_causal=True)
        found["routers, thresholds set"] = [asdict(one) for one in measure(model, batches)]
    return found


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
    for title in ("routers", "routers on training data", "routers, thresholds set"):
        for kind in ("experts", "depth"):
            own = [one for one in result[title] if one["kind"] == kind]
            if own:
                means = {key: sum(one[key] for one in own) / len(own) for key in ("accuracy", "precision", "recall")}
                lines.append(f"{title}, {kind}: " + ", ".join(f"{key} {mean:.1%}" for key, mean in means.items()))
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
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {name: str(held) if isinstance(held, Path) else held for name, held in vars(args).items()},
        "omnimoe": omnimoe.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "corpus": corpus.meta["rows_sha256"][:12],
        "sisters": {},
    }
    for sister in args.sisters:
        folder = args.work / sister
        fresh = partial(declared, args.size, sister, args.gumbel, args.seed)
        first = shared.replace(steps=args.steps, learning_rate=args.lr, warmup=min(50, args.steps))
        trained = stage(fresh, first, corpus, folder / "first")
        second = shared.replace(
            steps=args.auxiliary_steps,
            learning_rate=args.auxiliary_lr,
            warmup=min(20, args.auxiliary_steps),
            stage="auxiliary",
        )
        with_routers = partial(add_auxiliary_routers, trained.model)
        run = stage(with_routers, second, corpus, folder / "second", folder / "first")
        result["sisters"][sister] = measured(run, args.tuning_batches) | {
            "first": trained.history.to_dict(),
            "second": run.history.to_dict(),
            "auxiliary_params": sum(
                held.numel()
                for module in run.model.modules()
                if isinstance(module, AuxiliaryRouter)
                for held in module.parameters()
            ),
        }
        print(told(sister, result["sisters"][sister]), flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
