"""transformers' own mixtures of experts on our kernels: ``model.set_experts_implementation("omnimoe")``.

Importing this module registers the name with transformers' interface of experts, which some sixty of its models go
through; a model of omnimoe imports it too.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from omnimoe.ops import BackendError, experts_mlp, route_plan
from omnimoe.ops.experts_mlp.activations import CLAMP_LIMIT, CLAMP_SLOPE

NAME = "omnimoe"

ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
"""Classes and functions of transformers and PyTorch to our names."""

CLAMPED = ("GptOssExperts", "OpenAIPrivacyFilterExperts")
"""Classes whose own gate is our ``clamped_silu``, with the constants that ours has."""


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One layer of experts, with the signature of transformers' interface.

    Args:
        self: transformers' module, which holds ``gate_up_proj`` or ``up_proj``, and ``down_proj``.
        hidden_states: ``(T, D)``.
        top_k_index: ``(T, K)``; indices past the last expert, which expert parallelism uses, are left out.
        top_k_weights: ``(T, K)``.

    Returns:
        ``(T, D)`` in the dtype of ``hidden_states``.

    Raises:
        BackendError: for a layout that our op does not have: a norm after the experts, a gate or an activation of the
            model's own other than gpt-oss's.
    """
    into = self.gate_up_proj if self.has_gate else self.up_proj
    biases = {}
    if self.has_bias:
        biases["gate_up_bias"] = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        biases["down_bias"] = self.down_proj_bias
    plan = route_plan(top_k_index, into.shape[0])
    weights = top_k_weights.reshape(-1)[plan.order]
    operands = (hidden_states, into, self.down_proj, plan.offsets, _activation(self), plan.token_index, weights)
    interleaved = self.has_gate and not self.is_concatenated
    y = experts_mlp(*operands, **biases, interleaved=interleaved, transposed=self.is_transposed)
    return y.to(hidden_states.dtype)


def _activation(module: nn.Module) -> str:
    """The name of the activation; refuses what is not the plain network or gpt-oss's."""
    act = getattr(module, "act_fn", None)
    name = ACTIVATIONS.get(getattr(act, "__name__", type(act).__name__))
    is_own = module.has_gate and getattr(module._apply_gate, "__func__", None) is not _default_apply_gate
    if is_own and type(module).__name__ in CLAMPED:
        constants = module.alpha, module.limit
        name = "clamped_silu" if constants == (CLAMP_SLOPE, CLAMP_LIMIT) else None
        is_own = name is None
    reasons = {
        "a norm follows its experts": module.has_post_expert_norm,
        "it has a gate of its own": is_own,
        f"its activation is {type(act).__name__}": name is None and not is_own,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found or name is None:
        raise BackendError(
            f"{type(module).__name__} cannot run on omnimoe's kernels: {'; '.join(found)}. "
            "Take set_experts_implementation('grouped_mm')"
        )
    return name


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
