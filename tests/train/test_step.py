"""A step checks what it measured before the weights move, and says where a router went wrong."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omnimoe.config import ConfigError
from omnimoe.inputs import InputError
from omnimoe.train import ResumeError, RouterError, Training, TrainingError
from tests.refusals import refused
from tests.train.runs import gives_up, held_by, same_tensors, settings, training

pytestmark = pytest.mark.hazard(16)


def scorer(run: Training, layer: int, modality: int) -> torch.Tensor:
    """The weights that route a modality in a layer."""
    return run.model.model.backbone.layers[layer].mlp.router.routers[modality].scorer.weight


def spoil(run: Training, value: float, *, layer: int = 1, modality: int = 1) -> None:
    with torch.no_grad():
        # one of both signs, so that an overflow is towards plus infinity for one expert
        scorer(run, layer, modality)[0, 0] = value
        scorer(run, layer, modality)[1, 0] = -value


@pytest.mark.parametrize("kind", ["top_k", "expert_choice"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_layer_the_modality_and_the_step_are_named_and_nothing_has_moved(corpus, tmp_path, kind, value):
    run = training(corpus, kind, out=tmp_path, evaluate_batches=0)
    run.run(until=2)
    spoil(run, value)
    with refused(
        lambda: held_by(run), "the router of layer 1 is not finite at step 3 for image (", RouterError
    ) as caught:
        run.run()
    told = str(caught)
    assert "text" not in told.partition(";")[0]
    assert "its own weights are not finite" in told
    assert "z_loss_coef" in told
    assert all(parameter.grad is None for parameter in run.model.parameters())
    again = training(corpus, kind, out=tmp_path, evaluate_batches=0)
    again.resume()
    assert again.step == 2


def test_a_router_is_not_blamed_for_what_reaches_it(corpus):
    run = training(corpus, "top_k", evaluate_batches=0)
    with torch.no_grad():
        run.model.model.backbone.layers[0].self_attn.o_proj.weight.fill_(float("nan"))
    with gives_up(run, "; its weights are finite, so what reaches it", RouterError) as told:
        run.run()
    assert "the router of layer 0 is not finite at step 1 for text" in str(told)


def test_one_of_several_forwards_is_enough(corpus):
    run, forwards = training(corpus, "top_k", accumulate=3, evaluate_batches=0), []

    def once(_module, _args, out):
        forwards.append(1)
        return out * float("nan") if len(forwards) == 2 else out

    run.model.model.backbone.layers[1].mlp.router.routers[2].scorer.register_forward_hook(once)
    with gives_up(run, "the router of layer 1 is not finite at step 1 for speech (", RouterError):
        run.run()
    assert len(forwards) == 3


def test_a_warning_goes_on_and_off_does_not_look(corpus, caplog):
    # sigmoid scores of an infinite logit are finite, so such a run can go on
    quiet, warned = (training(corpus, "expert_choice", steps=2, router_nan=how) for how in ("off", "warn"))
    for run in (quiet, warned):
        spoil(run, 3e38)
        with caplog.at_level(logging.WARNING, logger="omnimoe"):
            run.run()
        assert run.step == 2
        assert ("layer 1 is not finite at step 1 for image" in caplog.text) == (run is warned)
    assert same_tensors(dict(quiet.model.state_dict()), dict(warned.model.state_dict()))
    raising = training(corpus, "expert_choice", steps=2)
    spoil(raising, 3e38)
    told = "the router of layer 1 is not finite at step 1 for image"
    with gives_up(raising, told, RouterError):
        raising.run()


def test_a_run_may_be_resumed_with_another_way_to_treat_routers(corpus, tmp_path):
    training(corpus, "top_k", out=tmp_path).run(until=2)
    training(corpus, "top_k", out=tmp_path, router_nan="off").resume()
    other = training(corpus, "top_k", out=tmp_path, noise="image=0.1")
    with refused((lambda: held_by(other), tmp_path), "noise was", ResumeError):
        other.resume()


def test_an_unknown_way_is_refused():
    known = settings()
    with refused(known.to_dict, "unknown router_nan 'stop'; known: raise, warn, off", ConfigError):
        known.replace(router_nan="stop")


class Reads(TorchDispatchMode):
    """Counts what is read back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_looking_at_routers_adds_no_read(corpus):
    counts = []
    for how in ("off", "raise"):
        run = training(corpus, "top_k", accumulate=2, router_nan=how, evaluate_batches=0, steps=1)
        with Reads() as reads:
            run.run()
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.mark.hazard(21)
@pytest.mark.parametrize("wrong", [-1, 10**9])
def test_ids_out_of_range_are_refused_before_they_reach_a_device(corpus, wrong):
    run = training(corpus, evaluate_batches=0)
    cursor, reached = run.batches.state_dict(), []
    run.model.model.embed_tokens.register_forward_pre_hook(lambda *_: reached.append(1))
    given = next(run.batches)
    run.batches.load_state_dict(cursor)
    given["input_ids"][0, 3] = wrong
    run.batches = type("One", (), {"__next__": lambda _: given, "state_dict": dict, "load_state_dict": dict.update})()
    run.batches.load_state_dict = lambda _: None
    with gives_up(run, f"input_ids holds {wrong}, outside", InputError):
        run.run()
    assert not reached


def test_a_step_that_is_no_number_leaves_its_batches_for_the_next(corpus):
    run = training(corpus, evaluate_batches=0)
    hook = run.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with gives_up(run, "norm of the gradient", TrainingError):
        run.run()
    hook.remove()
    run.run()
    whole = training(corpus, evaluate_batches=0)
    whole.run()
    assert same_tensors(dict(run.model.state_dict()), dict(whole.model.state_dict()))
