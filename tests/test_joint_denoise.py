"""Rows of several modalities drawn together: against a plain loop over forwards, with and without a cache."""

from __future__ import annotations

import pytest
import torch

from omnimoe import Attention, FeedForward, InputError, OmniMoeConfig, OmniMoeForCausalLM, Tokens, denoise
from omnimoe.joint_denoise import EulerSampler, SchedulerSampler, denoise_jointly
from omnimoe.modalities import DomainPatches, GridPatches, TimedPatches

MODALITIES = (
    Tokens.Config(name="text", vocab_size=20),
    TimedPatches.Config(name="clip", channels=4, placeholder_id=11),
    DomainPatches.Config(name="arm", channels=3, num_domains=2, time_of="clip", placeholder_id=12),
)
CONFIG = OmniMoeConfig(
    hidden_size=32,
    num_layers=2,
    modalities=MODALITIES,
    attention=Attention.Config(num_heads=4, towers=(0, 1, 1)),
    experts=FeedForward.Config(intermediate_size=32, towers=(0, 1, 1)),
    mask="block_causal",
    bidirectional_modalities=("clip", "arm"),
    joint_blocks=True,
    private_blocks=True,
)


@pytest.fixture(scope="module")
def model() -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    made = OmniMoeForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return made


def condition(words: list[list[int]]) -> dict:
    """Words of two samples, padded in front, and behind them three rows of a clip and two of an arm."""
    length = max(map(len, words))
    ids = [[0] * (length - len(row)) + row + [11] * 3 + [12] * 2 for row in words]
    mask = [[0] * (length - len(row)) + [1] * (len(row) + 5) for row in words]
    draw = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "position_ids": (torch.tensor(mask).cumsum(1) - 1).clamp_min(0),
        "features": {
            "clip": torch.randn(6, 4, generator=draw),
            "arm": {"rows": torch.randn(2, 2, 3, generator=draw), "domains": torch.tensor([1, 0])},
        },
    }


GIVEN, AGAINST = condition([[1, 2, 3], [4]]), condition([[5, 6, 7, 8], [9, 10]])
NOISY = {"clip": torch.tensor([False, True, True] * 2), "arm": torch.tensor([True] * 4)}
NOISE = {"clip": torch.randn(4, 4, generator=torch.Generator().manual_seed(2)), "arm": torch.randn(4, 3)}


@torch.no_grad()
def walked(model, steps: int, scale: float) -> dict[str, torch.Tensor]:
    clip, arm = GIVEN["features"]["clip"].clone(), NOISE["arm"].clone()
    clip[NOISY["clip"]] = NOISE["clip"]
    for index in range(steps):
        time = 1 - index / steps
        found = []
        for side in (GIVEN, AGAINST):
            features = {"clip": clip, "arm": {**side["features"]["arm"], "rows": arm.view(2, 2, 3)}}
            times = {"clip": NOISY["clip"] * time, "arm": torch.full((4,), time)}
            found.append(model(**{**side, "features": features}, timesteps=times).predictions)
        step = {name: found[1][name] + scale * (found[0][name] - found[1][name]) for name in found[0]}
        clip = torch.where(NOISY["clip"].unsqueeze(1), clip - step["clip"] / steps, clip)
        arm = arm - step["arm"] / steps
    return {"clip": clip[NOISY["clip"]], "arm": arm}


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_plain_loop_gives_the_same(model, use_cache, scale):
    options = {"against": AGAINST, "scale": scale, "sampler": EulerSampler(4), "noise": NOISE, "use_cache": use_cache}
    found = denoise_jointly(model, GIVEN, NOISY, **options)
    wanted = walked(model, 4, scale)
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name], rows, atol=1e-5, rtol=1e-4)


def test_the_words_are_computed_once(model, monkeypatch):
    lengths, forward = [], model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **given: lengths.append(given["input_ids"].shape[1]) or forward(**given)
    )
    denoise_jointly(model, GIVEN, NOISY, sampler=EulerSampler(3), noise=NOISE)
    assert lengths == [3, 5, 5, 5]


def test_one_modality_alone_is_what_denoise_draws(model):
    given = {**GIVEN, "features": {"clip": torch.zeros(6, 4), "arm": GIVEN["features"]["arm"]}}
    noisy = {"clip": torch.ones(6, dtype=torch.bool)}
    noise = torch.randn(6, 4)
    found = denoise_jointly(model, given, noisy, sampler=EulerSampler(3, shift=2.0), noise={"clip": noise})
    # the actions are spans of a form of their own, which denoise has no pictures for
    plain = {key: held for key, held in GIVEN.items() if key != "features"}
    wanted = denoise(
        model, "clip", **plain, features={"arm": GIVEN["features"]["arm"]}, steps=3, shift=2.0, noise=noise
    )
    torch.testing.assert_close(found["clip"], wanted, atol=1e-5, rtol=1e-4)


def test_a_scheduler_of_diffusers_steps_as_it_does_alone(model):
    diffusers = pytest.importorskip("diffusers", reason="pip install 'omnimoe[diffusers]'")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    sampler = SchedulerSampler(scheduler, 4)
    assert sampler.times[-1] == 0
    assert all(first > second for first, second in zip(sampler.times, sampler.times[1:], strict=False))
    found = denoise_jointly(model, GIVEN, NOISY, sampler=sampler, noise=NOISE)
    scheduler.set_timesteps(4)
    clip, arm = GIVEN["features"]["clip"].clone(), NOISE["arm"].clone()
    clip[NOISY["clip"]] = NOISE["clip"]
    other = diffusers.UniPCMultistepScheduler.from_config(scheduler.config)
    other.set_timesteps(4)
    with torch.no_grad():
        for time in scheduler.timesteps:
            features = {"clip": clip, "arm": {**GIVEN["features"]["arm"], "rows": arm.view(2, 2, 3)}}
            times = {"clip": NOISY["clip"] * time / 1000, "arm": torch.full((4,), float(time) / 1000)}
            out = model(**{**GIVEN, "features": features}, timesteps=times).predictions
            # the whole clip is stepped, as in the published pipeline, with no velocity where it is given
            velocity = out["clip"] * NOISY["clip"].unsqueeze(1)
            clip = scheduler.step(velocity[None], time, clip[None], return_dict=False)[0][0]
            arm = other.step(out["arm"][None], time, arm[None], return_dict=False)[0][0]
    torch.testing.assert_close(found["clip"], clip[NOISY["clip"]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["arm"], arm, atol=1e-4, rtol=1e-4)


def test_what_is_held_stays_at_zero(model):
    held = {"arm": torch.zeros(4, 3, dtype=torch.bool)}
    held["arm"][:, 2] = True
    options = {"sampler": EulerSampler(3), "noise": NOISE}
    found = denoise_jointly(model, GIVEN, NOISY, held=held, **options)
    assert float(found["arm"][:, 2].abs().max()) == 0
    assert not torch.allclose(found["clip"], denoise_jointly(model, GIVEN, NOISY, **options)["clip"])


def test_seeds_are_kept_apart(model):
    first, again = (denoise_jointly(model, GIVEN, NOISY, sampler=EulerSampler(1), seed=3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = denoise_jointly(model, GIVEN, NOISY, sampler=EulerSampler(1), seed=4)
    assert not torch.equal(first["clip"], other["clip"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"scale": 2.0}, "scale 2.0 guides away from a second condition"),
        (
            {"noisy": {"text": torch.ones(1, dtype=torch.bool)}},
            r"'text' has no rows with a time each.*\['clip', 'arm'\]",
        ),
        ({"noisy": {"clip": torch.ones(5, dtype=torch.bool)}}, r"noisy\['clip'\] must be \(6,\) bool"),
        ({"noise": {"clip": torch.zeros(1, 4)}}, r"noise\['clip'\] must be \(4, 4\), got \(1, 4\)"),
        ({"given": {**GIVEN, "features": {}}}, "there are no features of 'clip'"),
    ],
)
def test_what_does_not_fit_is_refused(model, changes, said):
    given = {"given": GIVEN, "noisy": NOISY, "sampler": EulerSampler(1), **changes}
    with pytest.raises(InputError, match=said):
        denoise_jointly(model, **given)


def test_pictures_with_one_time_each_are_left_to_denoise():
    picture = GridPatches.Config(name="picture", channels=4, placeholder_id=11)
    config = CONFIG.replace(
        modalities=(MODALITIES[0], picture),
        attention=Attention.Config(num_heads=4),
        experts=FeedForward.Config(intermediate_size=32),
        bidirectional_modalities=("picture",),
    )
    with pytest.raises(InputError, match="'picture' has no rows with a time each"):
        denoise_jointly(OmniMoeForCausalLM(config), GIVEN, {"picture": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(InputError, match="steps must be at least 1"):
        EulerSampler(0)
    with pytest.raises(InputError, match="shift above 0 and finite, got 5 and inf"):
        EulerSampler(5, shift=float("inf"))
