"""The tensor-parallel, expert-parallel and FSDP mixins against four kinds of model."""

from __future__ import annotations

import unittest

from shared_suite import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from tester import OmniMoeTester

from omnimoe import OmniMoeForCausalLM, OmniMoeModel

# with a list of types, every model that is not on it is skipped
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class Shared(
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """What every kind runs."""

    kind: str
    all_model_classes = (OmniMoeModel, OmniMoeForCausalLM)
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = OmniMoeTester(self, self.kind)


class DenseTest(Shared, unittest.TestCase):
    kind = "dense"


class MotTest(Shared, unittest.TestCase):
    kind = "mot"


class MomaTest(Shared, unittest.TestCase):
    kind = "moma"


class MoeTest(Shared, unittest.TestCase):
    kind = "moe"
