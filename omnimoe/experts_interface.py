"""transformers' own mixtures of experts on our kernels: ``model.set_experts_implementation("omnimoe")``.

Importing this module registers the name with transformers' interface of experts, which some sixty of its models go
through; a model of omnimoe imports it too.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from omnimoe.ops import BackendError, experts_mlp, route_plan

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
        BackendError: for a layout that our op does not have: biases, a norm after the experts, gate and up interleaved,
            a gate or an activation of the model's own.
    """
    into = self.gate_up_proj if self.has_gate else self.up_proj
    down = self.down_proj
    if self.is_transposed:
        into, down = into.transpose(1, 2), down.transpose(1, 2)
    plan = route_plan(top_k_index, into.shape[0])
    weights = top_k_weights.reshape(-1)[plan.order]
    operands = (hidden_states, into, down, plan.offsets, _activation(self), plan.token_index, weights)
    return experts_mlp(*operands).to(hidden_states.dtype)


def _activation(module: nn.Module) -> str:
    """The name of the activation; refuses what is not the plain network."""
    act = getattr(module, "act_fn", None)
    name = ACTIVATIONS.get(getattr(act, "__name__", type(act).__name__))
    gate = getattr(module._apply_gate, "__func__", None)
    reasons = {
        "its experts have biases": module.has_bias,
        "a norm follows its experts": module.has_post_expert_norm,
        "its gate and up rows are interleaved": module.has_gate and not module.is_concatenated,
        "it has a gate of its own": module.has_gate and gate is not _default_apply_gate,
        f"its activation is {type(act).__name__}": name is None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found or name is None:
        raise BackendError(
            f"{type(module).__name__} cannot run on omnimoe's kernels: {'; '.join(found)}. "
            "Take set_experts_implementation('grouped_mm')"
        )
    return name


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
