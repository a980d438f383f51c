"""Held-out loss: by modality, a mean over tokens and not over batches, the same every time."""

from __future__ import annotations

import pytest
import torch

from omnimoe.train import evaluate, held_out_batches
from tests.train.runs import build, settings, tiny, training


@pytest.fixture(scope="module")
def batches(corpus):
    return held_out_batches(tiny(), settings(evaluate_batches=3), corpus)


@pytest.mark.parametrize("kind", ["dense", "mot", "top_k", "expert_choice"])
def test_the_loss_of_a_modality_is_the_mean_over_its_tokens(batches, kind):
    model = build(tiny(kind))
    found = evaluate(model, batches)
    totals, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        with torch.no_grad():
            each = model.eval()(**batch).token_losses.double()
        starts = torch.nn.functional.pad(batch["segment_ids"].diff(dim=1) != 0, (1, 0), value=True)
        counted = (batch["labels"] != -100) & ~starts
        for modality in range(3):
            chosen = counted & (model.model.modality_ids_of(batch["labels"].clamp_min(0)) == modality)
            totals[modality] += each[chosen].sum()
            counts[modality] += chosen.sum()
    assert [found[name] for name in ("text", "image", "speech")] == pytest.approx((totals / counts).tolist(), rel=1e-5)
    assert found["all"] == pytest.approx(float(totals.sum() / counts.sum()), rel=1e-5)


def test_it_gives_the_same_numbers_twice_and_leaves_the_mode_and_gradients_alone(batches):
    model = build(tiny("expert_choice"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    assert evaluate(model, batches) == evaluate(model, batches)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    evaluate(model, batches[:1])
    assert not model.training


def test_bf16_is_near_fp32(batches):
    model = build(tiny())
    exact, near = evaluate(model, batches), evaluate(model, batches, precision="bf16")
    assert near == pytest.approx(exact, rel=1e-2)
    assert near != exact


def test_a_modality_that_is_not_predicted_is_left_out(batches):
    model = build(tiny())
    image = model.config.token_ranges["image"]
    masked = []
    for batch in batches:
        is_image = (batch["labels"] >= image.start) & (batch["labels"] < image.stop)
        masked.append({**batch, "labels": batch["labels"].masked_fill(is_image, -100)})
    assert set(evaluate(model, masked)) == {"text", "speech", "all"}
    assert evaluate(model, []) == {}


@pytest.mark.parametrize(("kind", "has_twin"), [("expert_choice", True), ("top_k", False)])
def test_a_model_that_looks_ahead_is_evaluated_without_too(corpus, kind, has_twin):
    history = training(corpus, kind, steps=2, evaluate_every=1, evaluate_causally=True).run()
    assert bool(history.causal) == has_twin
    for name, losses in history.causal.items():
        assert len(losses) == len(history.steps)
        assert losses[-1] != history.held_out[name][-1]
    assert not training(corpus, kind, steps=1).run().causal, "only where it is asked for"
