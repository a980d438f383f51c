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

    def _get_tiny_config(self) -> tuple[type, dict]:
        """Without what the suite writes into it: it is small, and its heads are in the config of attention."""
        config = self.model_tester.get_config()
        return type(config), config.to_diff_dict()

    def test_moe_parallel_plans_shard_experts(self) -> None:
        if self.kind in ("dense", "mot"):
            self.skipTest("the bank of a feed-forward network is called experts too, but no router chooses from it")
        super().test_moe_parallel_plans_shard_experts()

    def test_tp_generation_quantized(self) -> None:
        self.skipTest("torchao's tensors for nn.Linear do not reach banks, which is refused; see omnimoe.quantize")


class DenseTest(Shared, unittest.TestCase):
    kind = "dense"


class MotTest(Shared, unittest.TestCase):
    kind = "mot"


class MomaTest(Shared, unittest.TestCase):
    kind = "moma"


class MoeTest(Shared, unittest.TestCase):
    kind = "moe"
