"""Rows with a time each: their formula, the network that modalities share, and maps of single domains."""

from __future__ import annotations

import math

import pytest
import torch

from omnimoe.config import ConfigError
from omnimoe.modalities import DomainPatches, Patches, TimedPatches, Tokens
from omnimoe.model import OmniMoeConfig, OmniMoeForCausalLM

VIDEO = TimedPatches.Config(name="video", channels=4, time_width=8, placeholder_id=7)
SOUND = TimedPatches.Config(name="sound", channels=3, time_of="video", is_marked=True, placeholder_id=8)
ACTION = DomainPatches.Config(
    name="action", channels=2, num_domains=3, time_of="video", is_marked=True, placeholder_id=9
)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.fixture
def model() -> OmniMoeForCausalLM:
    torch.manual_seed(0)
    text = Tokens.Config(name="text", vocab_size=10)
    return randomised(
        OmniMoeForCausalLM(OmniMoeConfig(hidden_size=16, num_layers=1, modalities=(text, VIDEO, SOUND, ACTION)))
    )


def time_code(video: TimedPatches, time: float) -> torch.Tensor:
    rate = torch.tensor([10_000.0 ** (-i / 4) for i in range(4)])
    code = torch.cat(((time * rate).cos(), (time * rate).sin()))
    return video.time_out(torch.nn.functional.silu(video.time_in(code)))


def test_rows_by_their_formula(model):
    parts = model.model.modalities
    rows, times = torch.randn(3, 4), torch.tensor([0.25, 0.0, 1.0])
    found = parts["video"].embed(rows, times)
    for row, time, got in zip(rows, times.tolist(), found, strict=True):
        wanted = parts["video"].in_proj @ row + parts["video"].in_bias
        torch.testing.assert_close(got, wanted + time_code(parts["video"], time) if time else wanted)
    assert torch.equal(parts["video"].embed(rows), parts["video"].embed(rows, torch.zeros(3)))


def test_a_modality_uses_the_network_of_another(model):
    video, sound = (model.model.modalities[name] for name in ("video", "sound"))
    rows = torch.randn(2, 3)
    wanted = rows @ sound.in_proj.T + sound.in_bias + sound.marker + time_code(video, 0.5)
    torch.testing.assert_close(sound.embed(rows, torch.full((2,), 0.5)), wanted)
    assert not [name for name, _ in model.named_parameters() if "sound.time" in name or "action.time" in name]


def test_each_domain_has_its_own_maps(model):
    video, action = (model.model.modalities[name] for name in ("video", "action"))
    rows, domains = torch.randn(2, 3, 2), torch.tensor([2, 0])
    given = {"rows": rows, "domains": domains}
    found = action.embed(given, torch.tensor([0.5, 0.0])).view(2, 3, 16)
    hidden = torch.randn(6, 16)
    out = action.predict(hidden, given).view(2, 3, 2)
    for span, domain in enumerate(domains.tolist()):
        wanted = rows[span] @ action.in_proj[domain].T + action.in_bias[domain] + action.marker
        torch.testing.assert_close(found[span], wanted + (time_code(video, 0.5) if span == 0 else 0))
        torch.testing.assert_close(
            out[span], hidden.view(2, 3, 16)[span] @ action.out_proj[domain].T + action.out_bias[domain]
        )
    by_row = action.embed(given, torch.tensor([0.5] * 3 + [0.0] * 3)).view(2, 3, 16)
    assert torch.equal(by_row, found)
    plain = action.embed(rows, torch.zeros(2))
    assert torch.equal(plain, action.embed({"rows": rows, "domains": torch.zeros(2, dtype=torch.int64)}))
    assert torch.equal(action.rows_of(given), rows.flatten(0, 1))


def test_in_a_model_absent_ones_have_gradients_of_zero(model):
    ids = torch.tensor([[1, 2, 8, 8, 9, 9], [3, 9, 9, 8, 8, 4]])
    out = model(
        ids,
        features={
            "sound": torch.randn(4, 3),
            "action": {"rows": torch.randn(2, 2, 2), "domains": torch.tensor([1, 2])},
        },
        timesteps={"sound": torch.rand(4), "action": torch.tensor([0.5, 0.0])},
        targets={"sound": torch.randn(4, 3), "action": torch.randn(2, 2, 2)},
        labels=ids,
    )
    assert out.predictions["action"].shape == (4, 2)
    assert int(out.counts["action"]) == 2  # the span at time 0 is clean
    out.loss.backward()
    parts = dict(model.model.modalities.named_parameters())
    assert float(parts["video.in_proj"].grad.abs().max()) == 0
    assert float(parts["video.time_in.weight"].grad.abs().max()) > 0
    assert float(parts["action.in_proj"].grad[0].abs().max()) == 0
    assert float(parts["action.in_proj"].grad[1].abs().max()) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rows": torch.zeros(2, 3), "domains": torch.zeros(2)}, r"must be \{'rows': \(spans, n, 2\)"),
        ({"rows": torch.zeros(2, 3, 2), "domains": torch.tensor([0, 3])}, r"integers in \[0, 3\).*got \[0, 3\]"),
        ({"rows": torch.zeros(2, 3, 2), "domains": torch.tensor([0])}, r"must be \(2,\) integers"),
    ],
)
def test_spans_that_do_not_fit_are_refused(model, given, said):
    with pytest.raises(ValueError, match=said):
        model.model.modalities["action"].embed(given)


def test_times_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=r"must be \(6,\), one for each row, or \(2,\), one for each span, got \(5,\)"):
        model.model.modalities["action"].embed(torch.zeros(2, 3, 2), torch.zeros(5))


def test_a_network_that_is_not_there_is_refused():
    text = Tokens.Config(name="text", vocab_size=10)
    other = Patches.Config(name="video", channels=4, placeholder_id=7)
    for modalities in ((text, SOUND), (text, other, SOUND)):
        with pytest.raises(ConfigError, match="takes the network of the time from 'video', which has none"):
            OmniMoeForCausalLM(OmniMoeConfig(hidden_size=16, num_layers=1, modalities=modalities))
    with pytest.raises(ConfigError, match="time_width must be even"):
        TimedPatches.Config(name="video", time_width=7)
    with pytest.raises(ConfigError, match="num_domains must be at least 1, got 0"):
        DomainPatches.Config(name="action", num_domains=0)
    assert math.isclose(VIDEO.active_params(16), (8 + 8 + 16) * 16)
