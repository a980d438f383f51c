"""The model, configuration and training mixins against four kinds of model."""

from __future__ import annotations

import unittest

from shared_suite.generation.test_utils import GenerationTesterMixin
from shared_suite.test_configuration_common import ConfigTester
from shared_suite.test_modeling_common import ModelTesterMixin
from shared_suite.test_training_mixin import TrainingTesterMixin
from tester import OmniMoeTester

from omnimoe import OmniMoeConfig, OmniMoeForCausalLM, OmniMoeModel


class Shared(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """What every kind runs."""

    kind: str
    all_model_classes = (OmniMoeModel, OmniMoeForCausalLM)
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = OmniMoeTester(self, self.kind)
        self.config_tester = ConfigTester(self, config_class=OmniMoeConfig, hidden_size=48)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class DenseTest(Shared, unittest.TestCase):
    kind = "dense"


class MotTest(Shared, unittest.TestCase):
    kind = "mot"


class MomaTest(Shared, unittest.TestCase):
    kind = "moma"


class MoeTest(Shared, unittest.TestCase):
    kind = "moe"
