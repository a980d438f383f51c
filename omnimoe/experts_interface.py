"""transformers' interface of experts, from both sides: ``model.set_experts_implementation(name)``.

Importing this module registers ``"omnimoe"``, our kernels, with the interface, which some sixty of transformers' own
models go through. A model of omnimoe imports it too, has that name unless told otherwise, and takes any other of the
interface: ``"eager"``, ``"grouped_mm"``, ``"batched_mm"`` and what others registered.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from omnimoe.layers import BankMLP
from omnimoe.ops import BackendError, combine, experts_mlp, route_plan
from omnimoe.ops.experts_mlp.activations import ACTIVATIONS as OWN_ACTIVATIONS
from omnimoe.ops.experts_mlp.activations import CLAMP_LIMIT, CLAMP_SLOPE, GATED
from omnimoe.registry import RegistryError

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


class _AsTransformers:
    """A bank with the attributes that functions of the interface read."""

    has_bias = is_transposed = has_post_expert_norm = _is_expert_parallel = False
    is_concatenated = True

    def __init__(self, bank: BankMLP) -> None:
        into, self.down_proj = bank.weights()
        self.num_experts, _, width = self.down_proj.shape
        self.has_gate = into.shape[1] == 2 * width
        if self.has_gate:
            self.gate_up_proj = into
        else:
            self.up_proj = into
        self.activation = bank.activation
        self.config = SimpleNamespace(hidden_act=bank.activation)
        # a name that always has a gate is in the other table alone
        self.act_fn = OWN_ACTIVATIONS.get(bank.activation, _needs_gate)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return GATED[self.activation](*gate_up.chunk(2, dim=-1))


def _needs_gate(x: Tensor) -> Tensor:
    raise BackendError("this activation acts on a gate, and the experts have none")


def check_experts(name: str | None) -> None:
    """Refuses an implementation that is not there, when it is chosen and not at the first forward.

    Raises:
        RegistryError: if nothing has the name.
    """
    known = {"eager", NAME, *ALL_EXPERTS_FUNCTIONS.keys()}
    if name is not None and name not in known:
        # as transformers begins it
        raise RegistryError(
            f'Specified `experts_implementation="{name}"` is not supported; there are {", ".join(sorted(known))}'
        )


def experts_function(name: str | None) -> Callable | None:
    """How our banks compute under an implementation.

    Args:
        name: of transformers' interface, ``"eager"`` for the plain definition, or None.

    Returns:
        The last argument of :meth:`BankMLP.forward`; None for our own ops.

    Raises:
        RegistryError: if there is no implementation of that name.
    """
    if name is None or name == NAME:
        return None
    check_experts(name)
    function = _eager if name == "eager" else ALL_EXPERTS_FUNCTIONS.get(name)

    def compute(
        bank: BankMLP, x: Tensor, offsets: Tensor, token_index: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        rows = x if token_index is None else x[token_index]
        place = torch.arange(len(rows), device=x.device, dtype=offsets.dtype)
        ids = torch.searchsorted(offsets, place, right=True)
        # the last rows may be nobody's
        counts = (ids < len(offsets)).to(x.dtype)
        counts = counts if weights is None else counts * weights
        ids = ids.clamp(max=len(offsets) - 1)
        y = function(_AsTransformers(bank), rows, ids.unsqueeze(1), counts.unsqueeze(1))
        return y if token_index is None else combine(y, token_index, torch.ones_like(counts), len(x))

    return compute


def _eager(self: _AsTransformers, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One expert after the other."""
    y = torch.zeros_like(hidden_states)
    into = self.gate_up_proj if self.has_gate else self.up_proj
    for expert in range(self.num_experts):
        rows, choice = (top_k_index == expert).nonzero(as_tuple=True)
        hidden = hidden_states[rows] @ into[expert].t()
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        given = hidden @ self.down_proj[expert].t() * top_k_weights[rows, choice].unsqueeze(1)
        y = y.index_add(0, rows, given.to(y.dtype))
    return y


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
