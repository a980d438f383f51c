"""The model, configuration and training mixins against four kinds of model."""

from __future__ import annotations

import typing
import unittest
from unittest import mock

from shared_suite.generation.test_utils import GenerationTesterMixin
from shared_suite.test_configuration_common import ConfigTester
from shared_suite.test_modeling_common import ModelTesterMixin
from shared_suite.test_training_mixin import TrainingTesterMixin
from tester import OmniMoeTester

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, OmniMoeModel

for owner in (OmniMoeModel, OmniMoeForCausalLM):
    # our annotations are text; the suite reads from them which fields an output has
    owner.forward.__annotations__["return"] = typing.get_type_hints(owner.forward)["return"]


def without_experts(case: type) -> type:
    """Skips what needs experts that a router chooses among, which not every kind of model has."""
    skip = unittest.skip("nothing is routed, so there are no router logits and no other way to compute")
    routed = ("test_eager_matches_batched_and_grouped_", "test_output_router_logits_")
    for name in dir(case):
        if name.startswith(routed) and callable(getattr(case, name)):
            setattr(case, name, skip(getattr(case, name)))
    return case


class Shared(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """What every kind runs."""

    kind: str
    all_model_classes = (OmniMoeModel, OmniMoeForCausalLM)
    model_tester = None
    # the suite guesses a model's age from a line that our files do not have
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs = ("modality_ids",)

    def setUp(self) -> None:
        self.model_tester = OmniMoeTester(self, self.kind)
        self.config_tester = ConfigTester(self, config_class=OmniMoeConfig, hidden_size=48)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_moe_models_record_router_logits(self) -> None:
        # the suite looks for experts by a decorator's name in the model's file, and ours are in another
        with mock.patch("inspect.getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()


@without_experts
class DenseTest(Shared, unittest.TestCase):
    kind = "dense"


@without_experts
class MotTest(Shared, unittest.TestCase):
    kind = "mot"


class MomaTest(Shared, unittest.TestCase):
    kind = "moma"


class MoeTest(Shared, unittest.TestCase):
    kind = "moe"
