"""Which parts of which layers a plan names."""

from __future__ import annotations

import pytest
import torch

from omnimoe.backbone import LayerRange
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.routers import TopKRouter
from tests.declarations import DECLARATIONS, DENSE, routed

BIASED = routed(4, TopKRouter.Config(), bias=True)
JOINT = DENSE.attention.replace(qk_norm="rms_joint")


def split_parts(config, kind: str = "tp_plan", **rules: str) -> set[str]:
    """Layer and name of every part in the plan of a model."""
    with torch.device("meta"):
        model = OmniMoeForCausalLM(config)
    plan = model._expand_parallel_plan({**getattr(model, kind), **rules})
    return {name.removeprefix("model.backbone.layers.") for name in plan if ".layers." in name}


def layers_of(parts: set[str], part: str) -> set[str]:
    return {name.partition(".")[0] for name in parts if name.partition(".")[2].startswith(part)}


@pytest.mark.parametrize(("part", "changed"), [("mlp", {"experts": BIASED}), ("self_attn", {"attention": JOINT})])
def test_a_layer_whose_parts_cannot_be_split_stays_whole_beside_one_that_is_split(part, changed):
    mixed = DENSE.replace(num_layers=3, layers=(LayerRange(start=1, step=2, **changed),))
    parts = split_parts(mixed)
    assert layers_of(parts, part) == {"0", "2"}
    assert layers_of(parts, {"mlp": "self_attn", "self_attn": "mlp"}[part]) == {"0", "1", "2"}


def test_experts_are_spread_in_the_layers_that_route():
    assert layers_of(split_parts(DECLARATIONS["mot_hybrid"], "ep_plan"), "mlp") == {"1"}


def test_a_rule_of_a_user_holds_in_every_layer():
    mixed = DENSE.replace(num_layers=3, layers=(LayerRange(start=1, step=2, attention=JOINT),))
    mine = {"model.backbone.layers.*.self_attn.o_proj": "replicate"}
    assert layers_of(split_parts(mixed, **mine), "self_attn.o_proj") == {"0", "1", "2"}
