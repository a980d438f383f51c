"""Denoising: the loop over forwards, the cache before it, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from omnimoe.denoise import denoise
from omnimoe.experts import RoutedExperts
from omnimoe.guidance import Guidance
from omnimoe.inputs import InputError
from omnimoe.layers import Rope
from omnimoe.routers import ExpertChoiceRouter
from omnimoe.spans import span_positions
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


def test_what_guidance_leaves_is_kept_in_a_cache_of_its_own():
    model = build(CONFIG.replace(mask="causal"))
    ids, _ = layout()
    ids, drawn = ids[1:], torch.zeros(1, 11, dtype=torch.bool)
    drawn[:, 8:10] = True
    options: dict = {"drawn": drawn, "features": {"latent": torch.randn(3, 6)}, "steps": 3, "seed": 1}
    options["guidance"] = Guidance(scales=((("text",), 3.0),))
    calls = []
    forward = model.model.forward
    model.model.forward = lambda **given: calls.append(given["input_ids"].shape[1]) or forward(**given)
    wanted = denoise(model, "latent", ids, use_cache=False, **options)
    uncached = calls.copy()
    calls.clear()
    found = denoise(model, "latent", ids, **options)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert uncached == [11, 5] * 3
    assert calls == [8, 3] + [11 - 8, 5 - 3] * 3


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


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("rule", ["causal", "block_causal", "bidirectional"])
def test_a_guided_step_is_that_of_two_forwards(rule, axes):
    latent = PATCHES.replace(begin_id=8, end_id=9)
    attention = CONFIG.attention.replace(num_heads=2, num_kv_heads=1, rope=Rope.Config(sections=(2, 1, 1)))
    changes = {"modalities": (TEXT, latent), "mask": rule, "bidirectional_modalities": ("latent",)}
    model = build(CONFIG.replace(**changes, **({"attention": attention} if axes == 3 else {})))
    ids = torch.tensor([[0, 0, 1, 11, 12, 8, LATENT, LATENT, 9], [1, 13, 11, 12, 14, 15, 8, LATENT, LATENT]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    grid = {"latent": (1, 2)}
    spread = span_positions(model.config, ids, grid, mask)
    noise = torch.randn(4, 6)
    given = {"position_ids": spread if axes == 3 else None, "attention_mask": mask}
    found = denoise(model, "latent", ids, **given, steps=1, noise=noise, guidance=3.0)
    full = denoise(model, "latent", ids, **given, steps=1, noise=noise)
    alone = []
    for row, tail in enumerate(([LATENT, LATENT, 9], [LATENT, LATENT])):
        lone = torch.tensor([[1, 8, *tail]])
        places = span_positions(model.config, lone, grid) if axes == 3 else None
        part = noise[2 * row : 2 * row + 2]
        alone.append(denoise(model, "latent", lone, position_ids=places, steps=1, noise=part))
    # the step is linear in the prediction, so results mix as predictions do
    plain = torch.cat(alone)
    torch.testing.assert_close(found, plain + 3.0 * (full - plain), **CLOSE)
    assert not torch.allclose(found, full, atol=1e-2)


def test_given_pictures_are_part_of_the_condition():
    model = build(CONFIG)
    ids = torch.tensor([[1, 9, LATENT, LATENT, LATENT, 10, LATENT, LATENT]])
    drawn = ids == LATENT
    drawn[0, :5] = False
    options = {"drawn": drawn, "steps": 2, "seed": 0, "guidance": 0.0}
    one, other = (denoise(model, "latent", ids, features={"latent": torch.randn(3, 6)}, **options) for _ in range(2))
    torch.testing.assert_close(one, other)


def test_a_scale_of_one_is_no_guidance_to_the_bit():
    model = build(CONFIG)
    ids, mask = layout()
    given = {"attention_mask": mask, "steps": 2, "seed": 0}
    assert torch.equal(denoise(model, "latent", ids, **given), denoise(model, "latent", ids, guidance=1, **given))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(InputError, match="guidance must be 0 or more"):
        denoise(build(CONFIG), "latent", layout()[0], guidance=scale)
