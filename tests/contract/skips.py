"""What transformers' shared suite skips of omnimoe, and why that is right.

A test is skipped here because of the machine, or because it asks for something that these models do not have. The list
is compared exactly: a test that is skipped without standing here fails the run, and so does one that stands here and is
not skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from transformers.testing_utils import backend_device_count, torch_device
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)

KINDS = ("DenseTest", "MotTest", "MomaTest", "MoeTest")


@dataclass(frozen=True)
class Skips:
    """Tests that are skipped for one reason.

    Args:
        reason: why that is right.
        tests: their names.
        kinds: the kinds of model of which they are skipped.
        when: whether this machine skips them.
    """

    reason: str
    tests: tuple[str, ...]
    kinds: tuple[str, ...] = KINDS
    when: Callable[[], bool] = lambda: True


def _no_accelerator() -> bool:
    return torch_device == "cpu"


def _devices() -> int:
    return (os.cpu_count() or 1) if _no_accelerator() else backend_device_count(torch_device)


MODEL = (
    Skips(
        "needs an accelerator",
        (
            "test_can_load_with_device_context_manager",
            "test_can_load_with_global_device_set",
            "test_cpu_offload",
            "test_disk_offload_bin",
            "test_disk_offload_safetensors",
            "test_flex_attention_with_grads",
            "test_sdpa_can_compile_dynamic",
            "test_sdpa_can_dispatch_on_flash",
        ),
        when=_no_accelerator,
    ),
    Skips(
        "needs several accelerators",
        ("test_model_parallelism",),
        when=lambda: _no_accelerator() or backend_device_count(torch_device) < 2,
    ),
    Skips("is slow, and needs an accelerator", ("test_torch_compile_for_training",)),
    Skips("needs a Mac", ("test_flash_attn_kernels_mps_inference_equivalence",)),
    Skips(
        "needs the package flash-attn",
        (
            "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break",
            "test_flash_attn_2_can_dispatch_composite_models",
            "test_flash_attn_2_fp32_ln",
            "test_flash_attn_2_from_config",
            "test_flash_attn_2_inference_equivalence",
            "test_flash_attn_2_inference_equivalence_right_padding",
        ),
        when=lambda: not is_flash_attn_2_available(),
    ),
    Skips(
        "needs flash attention 3",
        (
            "test_flash_attn_3_can_dispatch_composite_models",
            "test_flash_attn_3_from_config",
            "test_flash_attn_3_inference_equivalence",
            "test_flash_attn_3_inference_equivalence_right_padding",
        ),
        when=lambda: not is_flash_attn_3_available(),
    ),
    Skips(
        "needs flash attention 4",
        (
            "test_flash_attn_4_can_dispatch_composite_models",
            "test_flash_attn_4_from_config",
            "test_flash_attn_4_inference_equivalence",
            "test_flash_attn_4_inference_equivalence_right_padding",
        ),
        when=lambda: not is_flash_attn_4_available(),
    ),
    Skips(
        "needs the package kernels and an accelerator",
        ("test_flash_attn_kernels_inference_equivalence", "test_kernels_can_load_without_crashing"),
        when=lambda: _no_accelerator() or not is_kernels_available(),
    ),
    Skips(
        "needs DeepSpeed",
        (
            "test_resize_embeddings_untied_with_deepspeed",
            "test_resize_embeddings_untied_with_deepspeed_multi_gpu",
            "test_resize_tokens_embeddings_with_deepspeed",
            "test_resize_tokens_embeddings_with_deepspeed_multi_gpu",
        ),
    ),
    Skips(
        "is for models made of other models; ours has one config",
        (
            "test_attn_implementation_composite_models",
            "test_can_set_attention_dynamically_composite_model",
            "test_internal_model_config_and_subconfig_are_same",
            "test_sdpa_can_dispatch_composite_models",
        ),
    ),
    Skips("is for an encoder with a decoder", ("test_encoder_decoder_loss_no_double_shift",)),
    Skips("is for learned positions", ("test_resize_position_vector_embeddings",)),
    Skips("is for sliding windows", ("test_sliding_window_mask",)),
    Skips(
        "reads rotary scaling from the top of the config; ours is in the config of attention, see tests/layers",
        (
            "test_model_rope_scaling_frequencies",
            "test_model_rope_scaling_from_config_0_linear",
            "test_model_rope_scaling_from_config_1_dynamic",
            "test_model_rope_scaling_from_config_2_yarn",
            "test_model_rope_with_partial_rotation",
            "test_vision_axial_rope",
        ),
    ),
    Skips(
        "is for names of parameters that change when a file is read; ours are the same",
        ("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"),
    ),
    Skips(
        "nothing is routed",
        (
            "test_eager_matches_batched_and_grouped_inference_0_fp16",
            "test_eager_matches_batched_and_grouped_inference_1_fp32",
            "test_eager_matches_batched_and_grouped_inference_2_bf16",
            "test_output_router_logits_from_config",
        ),
        kinds=("DenseTest", "MotTest"),
    ),
    Skips(
        "no router keeps a number in float32",
        ("test_keep_in_fp32_modules", "test_keep_in_fp32_modules_exist"),
        kinds=("DenseTest", "MotTest", "MomaTest"),
    ),
)
EXPERT_PARALLEL = (
    *(f"test_ep_forward_{case}" for case in range(6)),
    "test_ep_backward_0_eager",
    "test_ep_backward_1_grouped_mm",
    "test_ep_backward_2_batched_mm",
)
ROUTED, UNROUTED = ("MomaTest", "MoeTest"), ("DenseTest", "MotTest")
PARALLEL = (
    Skips(
        "has no experts to spread",
        (
            *EXPERT_PARALLEL,
            "test_fsdp2_expert_parallel_2d_vs_ddp",
            "test_fsdp2_expert_parallel_bf16_grads_0_experts_sharded",
            "test_fsdp2_expert_parallel_bf16_grads_1_experts_not_sharded",
            "test_hsdp_grad_accumulation_vs_single_device_2_expert_parallel",
        ),
        kinds=UNROUTED,
    ),
    Skips(
        "knows experts by an attribute of transformers' own classes; tests/parallel looks at our plans",
        ("test_moe_parallel_plans_shard_experts",),
    ),
    Skips(
        "needs four devices",
        (
            "test_hsdp_grad_accumulation_vs_single_device_0_replicate_and_shard",
            "test_hsdp_save_load",
            "test_hsdp_save_load_dcp",
        ),
        when=lambda: _devices() < 4,
    ),
    Skips(
        "needs four devices for its experts",
        ("test_fsdp2_expert_parallel_2d_vs_ddp", "test_fsdp2_expert_parallel_bf16_grads_0_experts_sharded"),
        kinds=ROUTED,
        when=lambda: _devices() < 4,
    ),
    Skips(
        "needs eight devices",
        ("test_hsdp_grad_accumulation_vs_single_device_2_expert_parallel",),
        kinds=ROUTED,
        when=lambda: _devices() < 8,
    ),
    Skips(
        "needs two devices",
        (
            "test_fsdp2_bf16_training",
            "test_fsdp2_plan_vs_ddp_0_untied",
            "test_fsdp2_plan_vs_ddp_1_tied",
            "test_fsdp2_save_load",
            "test_fsdp2_save_load_dcp",
            "test_fsdp2_sharding_structure_0_untied",
            "test_fsdp2_sharding_structure_1_tied",
            "test_hsdp_grad_accumulation_vs_single_device_1_replicate_only",
        ),
        when=lambda: _devices() < 2,
    ),
    Skips(
        "runs on CPUs alone, where there are two",
        ("test_tp_backward", "test_tp_forward_0", "test_tp_forward_1", "test_tp_generation"),
        when=lambda: not _no_accelerator() or _devices() < 2,
    ),
    Skips(
        "quantises nn.Linear alone, which does not reach banks, so omnimoe.quantize refuses it",
        ("test_tp_generation_quantized",),
    ),
    Skips(
        "spreads experts on CPUs alone, where there are two",
        EXPERT_PARALLEL,
        kinds=ROUTED,
        when=lambda: not _no_accelerator() or _devices() < 2,
    ),
    Skips(
        "needs two devices for its experts",
        ("test_fsdp2_expert_parallel_bf16_grads_1_experts_not_sharded",),
        kinds=ROUTED,
        when=lambda: _devices() < 2,
    ),
)
EXPECTED = {"model": MODEL, "parallel": PARALLEL}


def compare(job: str, outcomes: dict[str, dict[str, str]], *, is_whole: bool = True) -> list[str]:
    """What is not as expected.

    Args:
        job: ``"model"`` or ``"parallel"``.
        outcomes: of :func:`tests.contract.run.run`.
        is_whole: every test of the job ran, so an expected one that is not there is missing.

    Returns:
        One line for each failure, each skip that nobody expected and each expected one that was not skipped.
    """
    expected = {
        f"{kind}::{test}": group.reason
        for group in EXPECTED[job]
        if group.when()
        for kind in group.kinds
        for test in group.tests
    }
    wrong = [f"FAILED {name}: {held['reason']}" for name, held in outcomes.items() if held["outcome"] == "failed"]
    skipped = {name for name, held in outcomes.items() if held["outcome"] == "skipped"}
    for name in sorted(skipped - set(expected)):
        wrong.append(f"UNEXPECTED SKIP {name}: {outcomes[name]['reason']}")
    for name in sorted(set(expected) - skipped):
        if name in outcomes:
            wrong.append(f"NOT SKIPPED {name}, though it {expected[name]}: {outcomes[name]['outcome']}")
        elif is_whole:
            wrong.append(f"GONE {name}, which was skipped since it {expected[name]}")
    return wrong
