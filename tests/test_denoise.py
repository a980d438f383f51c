"""Denoising: the loop over forwards, the cache before it, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from omnimoe.denoise import denoise
from omnimoe.experts import RoutedExperts
from omnimoe.inputs import InputError
from omnimoe.routers import ExpertChoiceRouter
from tests.declarations import DECLARATIONS, DENSE, PATCHES, TEXT, build

CONFIG = DECLARATIONS["transfusion"]
LATENT = PATCHES.placeholder_id
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def layout() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the first left-padded: text, three latent rows, an end; and two such spans in the second."""
    ids = torch.tensor(
        [
            [0, 0, 0, 0, 1, 11, 12, LATENT, LATENT, LATENT, 13],
            [1, 9, LATENT, LATENT, LATENT, 10, 12, 14, LATENT, LATENT, 13],
        ]
    )
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_head_that_knows_the_target_recovers_the_data(objective, steps):
    model = build(CONFIG.replace(modalities=(TEXT, PATCHES.replace(objective=objective))))
    ids, mask = layout()
    data, noise = torch.randn(8, 6), torch.randn(8, 6)
    if objective == "ddpm":
        # the noisiest time is not pure noise under the cosine schedule, so start from where the data would be
        signal, scale = model.model.modalities["latent"].schedule(torch.tensor(1.0))
        start = signal * data + scale * noise
        model.model.modalities["latent"].head = lambda x: noise
    else:
        start = noise
        model.model.modalities["latent"].head = lambda x: noise - data
    found = denoise(model, "latent", ids, attention_mask=mask, steps=steps, noise=start)
    torch.testing.assert_close(found, data, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("rule", ["causal", "block_causal"])
@pytest.mark.parametrize("only_the_last", [False, True])
def test_cached_equals_uncached(rule, only_the_last):
    model = build(CONFIG.replace(mask=rule, bidirectional_modalities=("latent",)))
    ids, mask = layout()
    options: dict = {"attention_mask": mask, "steps": 3, "seed": 1}
    if only_the_last:
        drawn = ids == LATENT
        drawn[1, :5] = False
        options |= {"drawn": drawn, "features": {"latent": torch.randn(3, 6)}}
    calls = []
    forward = model.model.forward
    model.model.forward = lambda **given: calls.append(given["input_ids"].shape[1]) or forward(**given)
    wanted = denoise(model, "latent", ids, use_cache=False, **options)
    found = denoise(model, "latent", ids, **options)
    torch.testing.assert_close(found, wanted, **CLOSE)
    cut = 7 if only_the_last else 2
    assert calls == [11] * 3 + [cut] + [11 - cut] * 3


def test_a_row_is_drawn_in_a_batch_as_alone():
    model = build(CONFIG)
    ids, mask = layout()
    noise = torch.randn(8, 6)
    together = denoise(model, "latent", ids, attention_mask=mask, steps=4, noise=noise)
    alone = denoise(model, "latent", ids[:1, 4:], steps=4, noise=noise[:3])
    torch.testing.assert_close(together[:3], alone, **CLOSE)


def test_a_block_is_never_cut_in_two():
    """The second row's given picture goes on where the first row's drawn one begins."""
    model = build(CONFIG)
    ids = torch.tensor([[1, 9, 9, LATENT, LATENT, 9], [1, LATENT, LATENT, LATENT, 9, LATENT]])
    drawn = ids == LATENT
    drawn[1, :4] = False
    options = {"drawn": drawn, "features": {"latent": torch.randn(3, 6)}, "steps": 2, "seed": 0}
    torch.testing.assert_close(
        denoise(model, "latent", ids, **options), denoise(model, "latent", ids, use_cache=False, **options), **CLOSE
    )


def test_expert_choice_is_not_cached_unless_asked_for():
    routed = RoutedExperts.Config(num_experts=4, intermediate_size=24, router=ExpertChoiceRouter.Config())
    model = build(CONFIG.replace(experts=routed))
    ids, mask = layout()
    given = {"attention_mask": mask, "steps": 2, "seed": 0}
    usual = denoise(model, "latent", ids, **given)
    assert torch.equal(usual, denoise(model, "latent", ids, use_cache=False, **given))
    assert denoise(model, "latent", ids, use_cache=True, **given).isfinite().all()


def test_a_seed_repeats_and_leaves_the_global_generator_alone():
    model = build(CONFIG)
    ids, mask = layout()
    state = torch.get_rng_state()
    first, second, other = (denoise(model, "latent", ids, attention_mask=mask, steps=2, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (8, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "text"}, "no continuous modality"),
        ({"steps": 0}, "at least 1"),
        ({"input_ids": torch.tensor([[1, 9]])}, "has 0 of them"),
        ({"noise": torch.zeros(2, 6)}, r"must be \(8, 6\)"),
        ({"features": {"latent": torch.zeros(2, 6)}}, "0 rows of 'latent' are not drawn"),
        ({"drawn": torch.ones(2, 11, dtype=torch.bool)}, "mark positions of 'latent'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    ids, _ = layout()
    given = {"name": "latent", "input_ids": ids, **change}
    with pytest.raises(InputError, match=message):
        denoise(build(CONFIG), given.pop("name"), given.pop("input_ids"), **given)


def test_a_rule_that_looks_ahead_has_no_cache():
    model = build(CONFIG.replace(mask="bidirectional"))
    ids, mask = layout()
    assert denoise(model, "latent", ids, attention_mask=mask, steps=1).shape == (8, 6)
    with pytest.raises(InputError, match="lets a prefix see"):
        denoise(model, "latent", ids, attention_mask=mask, steps=1, use_cache=True)


def test_a_model_of_codes_has_nothing_to_denoise():
    with pytest.raises(InputError, match="it has none"):
        denoise(build(DENSE), "image", torch.tensor([[1, 9]]))
