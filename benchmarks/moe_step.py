"""A mixture-of-experts model beside the same model in transformers: prefill, and a training step without the optimizer.

The pre-norm form of a zoo model with token choice over all experts is Qwen3-MoE of equal shape: the same weights give
the same logits, which is checked before anything is timed. MoMa's tokens choose among the experts of their modality,
which Qwen3-MoE cannot; it stands beside one with as many experts of the same size, as many for each token, and is
checked against the reference implementation of every op. transformers runs its ``grouped_mm`` experts. Both see the
same tokens, in turn, in one process; the result is the median of the rounds' ratios.

    python benchmarks/moe_step.py --model moe_micro --out benchmarks/results/DATE-moe-step-cpu.json
    python benchmarks/moe_step.py --model moma_micro --out benchmarks/results/DATE-moma-step-cpu.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import omnimoe
from omnimoe import OmniMoeForCausalLM, RoutedExperts, load
from omnimoe.data import Corpus
from omnimoe.ops._extension import extension
from omnimoe.routers import ByModalityRouter, TopKRouter
from omnimoe.train import TrainSettings, training_batches

NAMES = {
    r"backbone\.layers\.": "layers.", r"mlp\.router\.(routers\.\w+\.)?scorer\.": "mlp.gate.",
    r"attention_norm\.": "input_layernorm.", r"mlp_norm\.": "post_attention_layernorm.",
}  # fmt: skip
"""Parts of our parameter names, as patterns, to transformers'."""


def twins(name: str) -> tuple[OmniMoeForCausalLM, Qwen3MoeForCausalLM]:
    """The pre-norm form of a zoo model, and Qwen3-MoE with its weights."""
    config = load(name, device="meta").config
    experts = config.experts
    router = experts.router if isinstance(experts, RoutedExperts.Config) else None
    is_by_modality = isinstance(router, ByModalityRouter.Config)
    choice = router.router if is_by_modality else router
    if not isinstance(choice, TopKRouter.Config):
        raise SystemExit(f"{name} has no token choice, as Qwen3-MoE has; take moe_micro or moma_micro")
    choice = choice.replace(load_balance_coef=0.0)
    experts = experts.replace(router=router.replace(router=choice) if is_by_modality else choice)
    config = config.replace(norm_placement="pre", experts=experts)
    attention = config.attention
    theirs = Qwen3MoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=attention.num_heads, num_key_value_heads=attention.num_heads,
        head_dim=config.hidden_size // attention.num_heads, num_experts=experts.num_experts,
        num_experts_per_tok=choice.top_k, moe_intermediate_size=experts.intermediate_size, norm_topk_prob=True,
        tie_word_embeddings=config.tie_word_embeddings, rms_norm_eps=config.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope.theta},
    )  # fmt: skip
    torch.manual_seed(0)
    ours, peer = OmniMoeForCausalLM(config), Qwen3MoeForCausalLM(theirs)
    peer.set_experts_implementation("grouped_mm")
    wanted = peer.state_dict()
    pieces: dict[str, list[torch.Tensor]] = {}
    for key, value in ours.state_dict().items():
        for part, other in NAMES.items():
            key = re.sub(part, other, key)
        pieces.setdefault(key, []).append(value)
    # a modality's experts lie side by side, and so do their routers' rows
    peer.load_state_dict({key: torch.cat(values).reshape(wanted[key].shape) for key, values in pieces.items()})
    return ours, peer


def check(ours: OmniMoeForCausalLM, peer: Qwen3MoeForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    """Ends the program where our logits are not those of the peer or, where that chooses otherwise, of plain ops."""
    is_by_modality = isinstance(ours.config.experts.router, ByModalityRouter.Config)
    with torch.no_grad():
        logits = ours(**batch).logits
        if is_by_modality:
            with omnimoe.backend("reference"):
                other = ours(**batch).logits
        else:
            other = peer(**batch).logits
    difference = float((logits - other).abs().max())
    print(f"largest difference of logits {'from plain ops ' if is_by_modality else ''}{difference:.1e}")
    if difference > 1e-3:
        raise SystemExit("the models differ; nothing is timed")


def step(model: nn.Module, batch: dict[str, torch.Tensor], *, backward: bool, bf16: bool) -> Callable[[], None]:
    """A piece of work to be timed."""

    def work() -> None:
        with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(**batch)
        if backward:
            out.loss.backward()
            model.zero_grad(set_to_none=True)

    return work


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="moe_micro")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    ours, peer = twins(args.model)
    settings = TrainSettings(batch_size=args.tokens // args.sequence_length, sequence_length=args.sequence_length)
    packed = next(training_batches(ours.config, settings, Corpus.load("p")))
    # whole rows, without packing: transformers' model knows no segments
    batch = {"input_ids": packed["input_ids"], "labels": packed["input_ids"]}
    check(ours, peer, batch)

    result: dict = {
        "date": datetime.now(UTC).date().isoformat(), "model": args.model, "tokens": args.tokens,
        "sequence_length": args.sequence_length, "threads": args.threads, "torch": torch.__version__,
        "transformers": transformers.__version__, "kernels": extension().instructions or extension().reason, "work": {},
    }  # fmt: skip
    for precision in args.precision:
        for name, backward in (("prefill", False), ("forward and backward", True)):
            given = batch if backward else {"input_ids": batch["input_ids"]}
            works = {
                who: step(model, given, backward=backward, bf16=precision == "bf16")
                for who, model in (("transformers", peer), ("omnimoe", ours))
            }
            seconds: dict[str, list[float]] = {who: [] for who in works}
            for round_ in range(args.rounds + 1):
                for who, work in works.items():
                    started = time.perf_counter()
                    work()
                    if round_:
                        seconds[who].append(time.perf_counter() - started)
            ratio = statistics.median(a / b for a, b in zip(seconds["transformers"], seconds["omnimoe"], strict=True))
            result["work"][f"{name}, {precision}"] = {"seconds": seconds, "ratio": ratio}
            told = ", ".join(f"{who} {statistics.median(values) * 1e3:.0f} ms" for who, values in seconds.items())
            print(f"{name}, {precision}: {told}, ratio {ratio:.2f}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
