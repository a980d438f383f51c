"""Settings that no router can have, or that would do nothing in the one they are given to, are refused when made."""

from __future__ import annotations

import dataclasses

import pytest

from omnimoe.config import ConfigError
from omnimoe.routers import (
    AttributeRouter,
    ByModalityRouter,
    DepthRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    SparseMixerRouter,
    TopKRouter,
)
from omnimoe.routers.balance import LOSS_COEFS, BalanceConfig
from tests.declarations import DENSE, routed

IMPOSSIBLE = {
    "a momentum above one": (ExpertChoiceRouter, {"cutoff_momentum": 2.0}, "below 1, got 2.0"),
    "a cut-off that stands still": (ExpertChoiceRouter, {"cutoff_momentum": 1.0}, "below 1, got 1.0"),
    "negative noise": (ExpertChoiceRouter, {"gumbel_noise": -1.0}, "gumbel_noise must be finite and not negative"),
    "a loss turned round": (ExpertChoiceRouter, {"auxiliary_coef": -1.0}, "auxiliary_coef must be .* got -1.0"),
    "of depth": (DepthRouter, {"auxiliary_coef": -1.0}, "auxiliary_coef must be finite and not negative, got -1.0"),
    "negative steps": (ExpertThresholdRouter, {"warmup_steps": -1}, "warmup_steps must be .* got -1"),
    "no end": (ExpertChoiceRouter, {"capacity_factor": float("inf")}, "capacity_factor must be positive.* got inf"),
    "less than is told apart": (ExpertChoiceRouter, {"capacity_factor": 1e-5}, "at least 0.0001, .* got 1e-05"),
    "next to no rows": (DepthRouter, {"capacity": 1e-5}, "at 0.0001 or more, and be at most 1, got 1e-05"),
    "a bias that runs away": (TopKRouter, {"expert_bias_rate": -0.1}, "expert_bias_rate must be .* got -0.1"),
    "less than one expert": (TopKRouter, {"global_entropy_experts": -1.0}, "at least 1, got -1.0; None asks for all"),
    "no target": (TopKRouter, {"expert_bias_target": 0.0}, "must be positive, got 0.0; None is an even share"),
    "weights of nothing": (TopKRouter, {"routed_scaling_factor": 0.0}, "positive, got 0.0; 1 leaves weights"),
    "weights without end": (TopKRouter, {"routed_scaling_factor": float("inf")}, "positive, got inf"),
    "groups in groups": (ByModalityRouter, {"router": ByModalityRouter.Config(experts=(2, 1))}, r"of \(2, 1\) inside"),
    **{name: (TopKRouter, {name: -0.5}, f"{name} must be finite and not negative, got -0.5") for name in LOSS_COEFS},
}
TABLE, FIXED = {"num_ids": 9, "top_k": 2}, {"num_ids": 9, "top_k": 2, "is_learned": False}
IDLE = {
    "noise": (ExpertThresholdRouter, {"gumbel_noise": 5.0}, "gumbel_noise=5.0 would do nothing"),
    "an auxiliary loss": (ExpertThresholdRouter, {"auxiliary_coef": 0.5}, "auxiliary_coef=0.5 would do nothing"),
    "dropped of nothing": (TopKRouter, {"normalize_kept": True}, "nothing is; set capacity_factor"),
    "jitter of what is not read": (AttributeRouter, {"input_jitter": 0.1}, "input_jitter=0.1 would do nothing"),
    "a share of what is whole": (SparseMixerRouter, {"zero_keeps_share": False}, "zero_keeps_share=False would do"),
    "a share of a table": (HashRouter, {**TABLE, "top_p": 0.1}, "chooses by the id alone, so top_p=0.1 would"),
    "a bias on a table": (HashRouter, {**TABLE, "expert_bias": "shared"}, "expert_bias='shared' would do nothing"),
    "groups of a table": (HashRouter, {**TABLE, "num_groups": 2}, "num_groups=2 would do nothing; leave it out"),
    "room": (HashRouter, {**FIXED, "capacity_factor": 1.0}, "none is dropped, so capacity_factor=1.0 would do nothing"),
    "losses": (
        HashRouter,
        {**FIXED, "load_balance_coef": 0.1, "z_loss_coef": 0.2},
        "so load_balance_coef=0.1, z_loss_coef=0.2 would do nothing",
    ),
    "a score": (HashRouter, {**FIXED, "score": "sigmoid"}, "score='sigmoid' would do nothing"),
}


@pytest.mark.parametrize("case", [*IMPOSSIBLE, *IDLE])
def test_it_is_refused_with_the_value(case):
    router, fields, told = {**IMPOSSIBLE, **IDLE}[case]
    with pytest.raises(ConfigError, match=told):
        router.Config(**fields)


def test_every_coefficient_is_looked_at():
    named = {field.name for field in dataclasses.fields(BalanceConfig) if field.name.endswith("_coef")}
    assert named == set(LOSS_COEFS)


def test_what_a_table_does_use_is_taken():
    learned = HashRouter.Config(**TABLE, capacity_factor=1.0, score="sigmoid", load_balance_coef=0.1, noise=0.1)
    assert learned.has_capacity
    assert HashRouter.Config(**FIXED, routed_scaling_factor=2.0, table="random", seed=3).top_k == 2


@pytest.mark.parametrize(
    "router",
    [
        HashRouter.Config(num_ids=DENSE.vocab_size, is_learned=False),
        TopKRouter.Config(score="sigmoid"),
        TopKRouter.Config(normalize=False),
        ByModalityRouter.Config(experts=(2, 2, 2), router=TopKRouter.Config(score="sigmoid")),
    ],
    ids=["a table", "sigmoid", "not divided", "in groups"],
)
def test_shared_experts_need_a_softmax_to_take_part_in(router):
    with pytest.raises(ConfigError, match="as it is set has none"):
        routed(6, router, num_shared_experts=1, shared_gate="softmax")
    for learned in (HashRouter.Config(num_ids=9), TopKRouter.Config(), SparseMixerRouter.Config()):
        assert routed(6, learned, num_shared_experts=1, shared_gate="softmax").num_gated_experts == 1
