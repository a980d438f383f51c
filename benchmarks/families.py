"""Published families beside the implementations they are published with, on copies of width 512 and 8 layers.

    python benchmarks/families.py --out benchmarks/results/DATE-families-cpu.json
    python benchmarks/families.py bagel ernie4_5_vl --dtype bfloat16 --rounds 15

Each pair holds the same random weights on the CPU, in float32 or in the bfloat16 that most of them are published in.
Both are given the same tokens and pictures, and do what generation does: a prompt whose last logits and cache are kept,
one token more, a step of drawing over a cache. Outputs are compared before anything is timed, and what differs is not
timed: in float32 with each other; in bfloat16 both with the other's in float32, of which ours may be no further away
than half as far again. A time is the median over rounds in which both take turns in one process. Beside it stands the
share of it that each spends inside matrix products, which bounds what can be won.

The text families stand beside transformers with its defaults: ``sdpa`` attention and ``grouped_mm`` experts. BAGEL
stands beside NeMo AutoModel's port, Cosmos3 beside transformers' reasoner and diffusers' transformer, BEiT-3 beside
torchscale: ``pip install --no-deps nemo-automodel==0.7.0 diffusers torchscale``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import bagel

import omnimoe
from omnimoe.ops._extension import extension
from tests.zoo.beit3 import peer as beit3
from tests.zoo.chameleon import peer as chameleon
from tests.zoo.cosmos3 import peer as cosmos3
from tests.zoo.ernie4_5_vl import peer as ernie
from tests.zoo.pi0 import peer as pi0
from tests.zoo.seeds.tiny import CASES

Cases = dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]

PROMPT, SEQUENCES, VOCAB = 256, 8, 32_000
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408, "max_position_embeddings": 1024,
}  # fmt: skip
SPARSE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 352}
LARGER: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 704},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 352},
    "qwen2_moe": {**SPARSE, "shared_expert_intermediate_size": 704, "num_hidden_layers": 8, "mlp_only_layers": []},
    "qwen3_moe": {**SPARSE, "decoder_sparse_step": 1, "head_dim": 64},
    "deepseek_v3": {
        "q_lora_rank": 192, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 352, "num_key_value_heads": 8,
        "num_hidden_layers": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "ernie4_5_moe": {"moe_num_experts": 16, "moe_k": 4, "moe_intermediate_size": 352, "num_hidden_layers": 8},
    "gpt_oss": {
        "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 352, "head_dim": 64,
        "num_hidden_layers": 8, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # fmt: skip
"""What a family's tiny case becomes."""


PRODUCTS = frozenset(
    f"{space}::{name}"
    for space, names in {
        "aten": ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "mkldnn_linear"),
        "omnimoe": ("grouped_mm", "experts_mlp"),
    }.items()
    for name in names
)
"""Matrix products, as a profile names them; ours hold the activation between two of them too."""


@torch.no_grad()
def text_cases(name: str, dtype: torch.dtype = torch.float32) -> Cases:
    """A language model: prefill, one token more of one sequence and of several."""
    kind, values = CASES[name]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**values, **SIZES, **LARGER.get(name, {})}))
    for key, parameter in theirs.named_parameters():
        parameter.copy_(1 + 0.1 * torch.randn_like(parameter) if "norm" in key else 0.02 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = omnimoe.from_pretrained(folder, dtype=dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.randint(0, VOCAB, (SEQUENCES, PROMPT))
    first, second = ((Prefill(m.eval(), ids[:1]), Decode(m, ids[:1]), Decode(m, ids)) for m in (ours, theirs))
    return dict(zip(("prefill", "decode", f"decode {SEQUENCES}"), zip(first, second, strict=True), strict=True))


class Prefill:
    """A prompt, and the logits of what follows it."""

    def __init__(self, model: Callable[..., Any], ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def __call__(self) -> Tensor:
        return self.model(self.ids, use_cache=True, logits_to_keep=1).logits


class Decode:
    """One token more for each sequence, which the cache forgets again."""

    def __init__(self, model: Callable[..., Any], ids: Tensor, **options: Any) -> None:
        self.model, self.ids, self.options = model, ids[:, -1:], options
        self.cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def __call__(self) -> Tensor:
        logits = self.model(self.ids, past_key_values=self.cache, use_cache=True, **self.options).logits
        self.cache.crop(-1)
        return logits


class Unmasked:
    """transformers' Chameleon with the logits of pictures, which it takes away."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, ids: Tensor, *, logits_to_keep: int = 0, **options: Any) -> Any:
        out = self.model.model(ids, **options)
        out.logits = self.model.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return out


@torch.no_grad()
def chameleon_cases(form: str, dtype: torch.dtype = torch.float32) -> Cases:
    """Words and codes of pictures: prefill, and one token more."""
    held = chameleon.make_pair(form, length=PROMPT, dtype=dtype)
    both = held.ours, Unmasked(held.theirs)
    first, second = ((Prefill(model, held.ids), Decode(model, held.ids)) for model in both)
    return dict(zip(("prefill", "decode"), zip(first, second, strict=True), strict=True))


@torch.no_grad()
def ernie_cases(dtype: torch.dtype = torch.float32) -> Cases:
    """Words around two pictures, and one token more after words."""
    held = ernie.make_pair(dtype=dtype)
    ids = torch.randint(100, 1000, (1, PROMPT))
    both = held.ours.eval(), held.theirs.eval()
    return {
        "prefill": (
            lambda: both[0](**held.given, use_cache=True, logits_to_keep=1).logits,
            lambda: both[1](**held.other, use_cache=True, logits_to_keep=1).logits,
        ),
        "decode": tuple(
            Decode(model, ids, position_ids=torch.full(shape, PROMPT - 1))
            for model, shape in zip(both, ((1, 1, 3), (3, 1, 1)), strict=True)
        ),
    }


def beit3_cases() -> Cases:
    """Pictures and words, read in both directions."""
    ours, theirs = beit3.side_by_side()
    return {"forward": (lambda: ours().last_hidden_state, theirs)}


FAMILIES: dict[str, Callable[..., Cases]] = {name: functools.partial(text_cases, name) for name in CASES}
FAMILIES |= {
    "bagel": bagel.cases,
    "beit3": beit3_cases,
    "cosmos3_omni": functools.partial(cosmos3.cases, "cosmos3_omni"),
    "cosmos3_edge": functools.partial(cosmos3.cases, "cosmos3_edge"),
    "ernie4_5_vl": ernie_cases,
    "pi0": pi0.cases,
    "chameleon_7b": functools.partial(chameleon_cases, "7b"),
    "chameleon_34b": functools.partial(chameleon_cases, "34b"),
}
OWNERS = (("our", "ours"), ("their", "theirs"))
IN_FLOAT32 = ("beit3", "pi0", "cosmos3_omni", "cosmos3_edge")
"""Whose pairs are made in float32 alone."""


@torch.no_grad()
def built(name: str, dtype: torch.dtype) -> tuple[Cases, dict[str, Tensor]]:
    """The cases of a family, and what the other gives in float32."""
    torch.manual_seed(0)
    exact = FAMILIES[name]()
    wanted = {case: calls[1]().float() for case, calls in exact.items()}
    if dtype == torch.float32:
        return exact, wanted
    del exact
    torch.manual_seed(0)
    return FAMILIES[name](dtype), wanted


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative error of an output."""
    return float((found.float() - wanted).norm() / wanted.norm())


def product_time(call: Callable[[], Tensor]) -> float:
    """Milliseconds of a call that are spent inside matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return sum(event.self_cpu_time_total for event in seen.key_averages() if event.key in PRODUCTS) / 1000


@torch.no_grad()
def measure(cases: Cases, wanted: dict[str, Tensor], rounds: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Times of each case in ms, how many times ours the other takes, and what of either is spent in products."""
    told = {}
    for name, calls in cases.items():
        error, other_error = (distance(call(), wanted[name]) for call in calls)
        allowed = 1e-4 if dtype == torch.float32 else 1.5 * other_error
        if not error <= allowed and dtype == torch.float32:
            raise SystemExit(f"{name}: the outputs are {error:.1e} away, of {allowed:.1e} at most; nothing is timed")
        if not error <= allowed:  # one choice of an expert that falls the other way is enough
            print(f"{name}: ours is {error:.1e} away from float32, theirs {other_error:.1e}; not timed", flush=True)
            continue
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for call, spent in zip(calls, times, strict=True):
                begun = time.perf_counter()
                call()
                spent.append(1000 * (time.perf_counter() - begun))
        mine, other = (statistics.median(spent) for spent in times)
        told[name] = {"ours_ms": mine, "theirs_ms": other, "ratio": other / mine}
        told[name] |= {"error": error, "their_error": other_error}
        told[name] |= dict(zip(("our_products_ms", "their_products_ms"), map(product_time, calls), strict=True))
    return told


def main() -> None:
    """Checks, times and tells."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)} (default: all)")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (default float32)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in FAMILIES]:
        parser.error(f"unknown family {unknown[0]!r}; known: {', '.join(FAMILIES)}")
    dtype = dtypes[args.dtype]
    if dtype != torch.float32:
        args.names = [name for name in args.names if name not in IN_FLOAT32]
    torch.set_num_threads(args.threads)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "nemo-automodel")}
    told = {"date": str(datetime.date.today()), "cpu": extension().instructions, "threads": args.threads, **versions}
    told["dtype"] = args.dtype
    told["families"] = {}
    for name in args.names:
        told["families"][name] = found = measure(*built(name, dtype), args.rounds, dtype)
        for case, row in found.items():
            times = f"ours {row['ours_ms']:8.1f} ms  theirs {row['theirs_ms']:8.1f} ms  {row['ratio']:.2f} times"
            own, other = (row[f"{whose}_products_ms"] / row[f"{who}_ms"] for whose, who in OWNERS)
            shares = f"in products {own:.0%} and {other:.0%}"
            print(f"{name:12} {case:9} {times}  {shares}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
