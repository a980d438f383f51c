"""Where memory runs out, the error says what a step needs and what helps, and nothing of the step stays behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimoe.train import OutOfMemoryError, Training, estimate_memory
from tests.children import capped, limited
from tests.train.runs import gives_up, same_tensors, training

ROOT = Path(__file__).parents[2]
HUGE = 1 << 50
CAP = (limited if torch.accelerator.is_available() else capped)(1 << 30)
"""A child, but where autograd has threads of an accelerator: no copy of such a process can take gradients."""


def allocate(*_args: object) -> None:
    """What no machine has; the allocator refuses it at once."""
    torch.empty(HUGE, dtype=torch.uint8)


def in_forward(run: Training):
    return run.model.model.backbone.layers[1].register_forward_hook(allocate)


def in_backward(run: Training):
    return run.model.model.norm.weight.register_hook(allocate)


def in_numpy(run: Training):
    return run.model.model.norm.register_forward_hook(lambda *_: np.ones(HUGE, np.uint8))


def on_a_gpu(run: Training):
    def refuse(*_args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    return run.model.lm_head.register_forward_hook(refuse)


PLACES = {"forward": in_forward, "backward": in_backward, "numpy": in_numpy, "a GPU": on_a_gpu}


@pytest.fixture(scope="module")
def unbroken(corpus) -> dict:
    run = training(corpus, "top_k", steps=3, evaluate_batches=0)
    run.run()
    return dict(run.model.state_dict())


@pytest.mark.hazard(24)
@pytest.mark.parametrize("place", PLACES)
@CAP
def test_the_error_tells_what_helps_and_the_run_can_go_on(corpus, unbroken, place):
    run = training(corpus, "top_k", steps=3, evaluate_batches=0)
    run.run(until=2)
    hook = PLACES[place](run)
    with gives_up(run, "out of memory at step 3: a step needs about ", OutOfMemoryError) as caught:
        run.run()
    told = str(caught)
    assert told.startswith("out of memory at step 3")
    for part in ("weights", "gradients", "AdamW's moments", "are free on cpu", "batch_size=1 with accumulate=2"):
        assert part in told
    for knob in ("checkpoint_activations=True", "sequence_length", "precision='bf16'"):
        assert knob in told
    assert all(parameter.grad is None for parameter in run.model.parameters())
    hook.remove()
    run.run()
    assert same_tensors(dict(run.model.state_dict()), unbroken)


@pytest.mark.hazard(24)
@CAP
def test_nothing_of_the_step_is_held_by_the_error(corpus):
    run, kept = training(corpus, evaluate_batches=0), []
    first, second = run.model.model.backbone.layers

    def forward(*given):
        out = type(first).forward(first, *given)
        kept.append(weakref.ref(out[0]))
        return out

    # in the place of hooks, which hold what they are given themselves
    first.forward, second.mlp.forward = forward, allocate
    with gives_up(run, "out of memory at step 1: a step needs about ", OutOfMemoryError) as caught:
        run.run()
    assert caught.value.__cause__ is not None
    # the first is of the step, the second of the few tokens of the estimate
    assert len(kept) == 2
    assert kept[0]() is None
    gc.collect()
    assert kept[1]() is None


def test_an_evaluation_that_needs_too_much_says_so(corpus):
    run = training(corpus)
    in_forward(run)
    with pytest.raises(OutOfMemoryError, match="in the evaluation after step 0: a step needs about"):
        run.run()


def test_other_errors_go_through(corpus):
    run = training(corpus, evaluate_batches=0)
    run.model.lm_head.register_forward_pre_hook(lambda *_: (torch.zeros(2, 3),))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        run.run()
    assert not isinstance(caught.value, OutOfMemoryError)


def test_knobs_that_are_turned_already_are_not_named(corpus):
    run = training(corpus, batch_size=1, checkpoint_activations=True, precision="bf16", evaluate_batches=0)
    in_forward(run)
    with pytest.raises(OutOfMemoryError, match="what helps: a shorter sequence_length \\("):
        run.run()


@pytest.mark.parametrize("kind", ["dense", "top_k", "expert_choice"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_near_what_a_whole_batch_keeps(corpus, kind, recompute):
    run = training(corpus, kind, batch_size=4, checkpoint_activations=recompute, evaluate_batches=0)
    batch = next(run.batches)
    found = estimate_memory(run.model, run.settings, batch)
    floats = sum(parameter.numel() for parameter in run.model.parameters())
    assert found.gradients == 4 * floats
    assert found.optimizer == 8 * floats
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = run.model.train()(**batch)
    real = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    assert out.loss.isfinite()
    assert found.activations == pytest.approx(real, rel=0.35)


CHILD = """
import json, resource, torch
from omnimoe.data import Corpus
from omnimoe.train import OutOfMemoryError
from tests.train.runs import training

corpus, told = Corpus.load("p"), []
small = training(corpus, "top_k", steps=2, evaluate_batches=0)
small.run()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
large = training(corpus, "top_k", steps=2, evaluate_batches=0, batch_size=256, sequence_length=512)
try:
    large.run()
except OutOfMemoryError as error:
    told.append(str(error))
assert all(parameter.grad is None for parameter in large.model.parameters())
again = training(corpus, "top_k", steps=2, evaluate_batches=0)
again.model.load_state_dict(large.model.state_dict())
again.run()
for name, value in again.model.state_dict().items():
    assert torch.equal(value, small.model.state_dict()[name]), name
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.hazard(24)
def test_a_process_with_little_memory_trains_a_smaller_batch_after_one_that_did_not_fit():
    with limited(8 << 30):
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert "out of memory at step 1: a step needs about" in told
    assert "activations of 256 x 512 tokens" in told
    assert "batch_size=128 with accumulate=2" in told
