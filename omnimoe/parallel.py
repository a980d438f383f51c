"""Tensor and expert parallelism of banks, for transformers' ``DistributedConfig``.

transformers' own styles shard ``nn.Linear``; a bank has a copy axis in front, and products of ours that know nothing of
DTensor. So each style here hands a bank its local part and puts the collectives around it. What a model's parts want is
written in their configs (``tp_plan``, ``ep_plan``); nothing in the layers knows of ranks.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.parallel_utils import _get_parameter_plan
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from omnimoe.ops import combine, route_plan

EP_STYLES = ("ep_dispatch_experts", "grouped_gemm")
"""transformers' styles of experts that lie on several ranks, each whole on one, and of their parameters."""


class ParallelError(ValueError):
    """A model that cannot be split as asked."""


class _SumGradients(torch.autograd.Function):
    """The same on every rank; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


@contextlib.contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    """Within it, the module holds the local parts of its own sharded parameters."""
    from torch.distributed.tensor import DTensor

    sharded = {name: held for name, held in module._parameters.items() if isinstance(held, DTensor)}
    for name, held in sharded.items():
        module._parameters[name] = held.to_local()
    try:
        yield
    finally:
        module._parameters.update(sharded)


class BankStyle(TensorParallelLayer):
    """Base of the styles: shards parameters by :meth:`placement`, then calls the module with its local parts."""

    def placement(self, module: nn.Module, name: str, size: int) -> Any:
        """How a parameter is laid out over ``size`` ranks; None leaves it whole on each."""
        return None

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Puts a DTensor in the place of a parameter, from what this rank has of it."""
        from torch.distributed.tensor import distribute_tensor

        whole = module._parameters.get(param)
        placement = None if whole is None else self.placement(module, param, mesh.size())
        if whole is None or placement is None:
            return
        split = whole.shape[placement.dim]
        pieces = mesh.size() * getattr(placement, "split_factor", 1)
        if split % pieces:
            raise ParallelError(
                f"{type(module).__name__}.{param} {tuple(whole.shape)} cannot be split over {mesh.size()} ranks, since "
                f"{split} is no multiple of {pieces}; take another tp_size"
            )
        sharded = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(sharded, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Puts :meth:`run` in the place of the module's forward."""
        module.forward = functools.partial(self.run, module, module.forward, mesh.get_group())
        return module

    def run(self, module: nn.Module, forward: Callable, group: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the module's own forward; what comes in and goes out is as without ranks, or split by heads."""
        with _local_parameters(module):
            return forward(*args, **kwargs)


class _Attention(BankStyle):
    """Refuses heads that do not divide; the projections inside have styles of their own."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        heads, kv_heads = module.num_heads, module.num_kv_heads
        if heads % mesh.size() or kv_heads % mesh.size():
            raise ParallelError(
                f"{heads} query heads and {kv_heads} key heads cannot be split over {mesh.size()} ranks; "
                "take a tp_size that divides both"
            )
        return module


class _Columns(BankStyle):
    """A bank whose outputs are split: weight ``(G, out, in)`` and bias ``(G, out)`` on the output axis."""

    def placement(self, module: nn.Module, name: str, size: int) -> Any:
        from torch.distributed.tensor import Shard

        return Shard(1)

    def run(self, module: nn.Module, forward: Callable, group: Any, *args: Any, **kwargs: Any) -> Any:
        with _local_parameters(module):
            return forward(_SumGradients.apply(args[0], group), *args[1:], **kwargs)


class _Rows(BankStyle):
    """A bank whose inputs are split; each rank adds its share of the bias, ``(G, out)``, which lies whole on all."""

    def placement(self, module: nn.Module, name: str, size: int) -> Any:
        from torch.distributed.tensor import Shard

        return Shard(2) if name == "weight" else None

    def run(self, module: nn.Module, forward: Callable, group: Any, *args: Any, **kwargs: Any) -> Any:
        bias = module._parameters.get("bias")
        with _local_parameters(module):
            if bias is not None:
                share = _SumGradients.apply(bias, group) / dist.get_world_size(group)
                module._parameters["bias"] = share
            try:
                return _Sum.apply(forward(*args, **kwargs), group)
            finally:
                if bias is not None:
                    module._parameters["bias"] = bias


class _HeadNorm(BankStyle):
    """A q/k norm over local heads: one scale for all heads lies whole on each, one a head, ``(G, H, C)``, is split."""

    def placement(self, module: nn.Module, name: str, size: int) -> Any:
        from torch.distributed.tensor import Shard

        return Shard(1) if module._parameters[name].ndim == 3 else None

    def run(self, module: nn.Module, forward: Callable, group: Any, *args: Any, **kwargs: Any) -> Any:
        from torch.distributed.tensor import DTensor

        whole = {name: held for name, held in module._parameters.items() if not isinstance(held, DTensor | None)}
        for name, held in whole.items():
            module._parameters[name] = _SumGradients.apply(held, group)
        try:
            with _local_parameters(module):
                return forward(*args, **kwargs)
        finally:
            module._parameters.update(whole)


class _Network(BankStyle):
    """A bank of feed-forward networks, split on the inner width: gate and up alike, and down on its inputs."""

    def placement(self, module: nn.Module, name: str, size: int) -> Any:
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        if name == "down_proj":
            return Shard(2)
        is_gated = module.gate_up_proj.shape[1] != module.down_proj.shape[2]
        return _StridedShard(dim=1, split_factor=2) if is_gated else Shard(1)

    def run(self, module: nn.Module, forward: Callable, group: Any, *args: Any, **kwargs: Any) -> Any:
        def shared(given: Any) -> Any:
            is_real = isinstance(given, Tensor) and given.is_floating_point()
            return _SumGradients.apply(given, group) if is_real else given

        kwargs = {name: shared(given) for name, given in kwargs.items()}
        with _local_parameters(module):
            return _Sum.apply(forward(*(shared(given) for given in args), **kwargs), group)


for _name, _style in (
    ("bank_attention", _Attention()),
    ("bank_colwise", _Columns()),
    ("bank_rowwise", _Rows()),
    ("bank_head_norm", _HeadNorm()),
    ("bank_mlp", _Network()),
):
    ALL_PARALLEL_STYLES.register(_name, _style)


class _DispatchedBank:
    """Puts transformers' dispatch of rows to ranks between our layers and a bank.

    transformers calls experts with ids and weights of each row, our layers with rows in runs. So the bank's forward is
    first made :meth:`by_ids`, which transformers encloses, and that is enclosed by :meth:`by_runs`.

    Args:
        bank: a ``BankMLP``.
    """

    def __init__(self, bank: Any) -> None:
        self.bank, self.own, self.dispatch = bank, bank.forward, bank.forward
        self.compute: Callable | None = None
        bank.num_experts = bank.num_copies  # transformers sets it to those of a rank
        bank.forward = self.by_ids

    def enclose(self) -> None:
        """Takes what transformers made of the bank's forward."""
        self.dispatch, self.bank.forward = self.bank.forward, self.by_runs

    def by_ids(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``(T, D)`` rows by ``(T, K)`` ids of this rank's experts; ids past the last have no result."""
        plan = route_plan(top_k_index, self.bank.num_experts)
        weights = top_k_weights.reshape(-1)[plan.order]
        given = {"token_index": plan.token_index, "weights": weights, "compute": self.compute}
        return self.own(hidden_states, plan.offsets, **given)

    def by_runs(
        self,
        x: Tensor,
        offsets: Tensor,
        copies: list[int] | None = None,
        token_index: Tensor | None = None,
        weights: Tensor | None = None,
        compute: Callable | None = None,
    ) -> Tensor:
        """As ``BankMLP.forward``."""
        num_rows = len(x) if token_index is None else len(token_index)
        run = torch.searchsorted(offsets, torch.arange(num_rows, device=x.device, dtype=offsets.dtype), right=True)
        is_held = run < len(offsets)  # rows past the last run go to no expert, and count nothing
        ids = run.clamp(max=len(offsets) - 1)
        if copies is not None:
            ids = torch.tensor(copies, device=x.device)[ids]
        given = x.new_ones(num_rows) if weights is None else weights
        rows = x if token_index is None else x.index_select(0, token_index)
        self.compute = compute
        try:
            y = self.dispatch(rows, ids.unsqueeze(1), torch.where(is_held, given, 0).unsqueeze(1))
        finally:
            self.compute = None
        return y if token_index is None else combine(y, token_index, torch.ones_like(given), len(x))


def _gather_with_embedding(head: nn.Module, embedding: nn.Module, model: nn.Module) -> None:
    """Makes a tied head, which was kept from FSDP2, read the weight that FSDP2 gathers for the embedding."""
    from torch.distributed.fsdp import FSDPModule

    head.weight = embedding.weight
    states = [part._get_fsdp_state() for part in model.modules() if isinstance(part, FSDPModule)]
    groups = [state._fsdp_param_group for state in states]
    for held in {id(held): held for group in groups if group is not None for held in group.fsdp_params}.values():
        if held._module_info.module is embedding:
            held._module_info.shared_modules.append(head)
            held._module_info.shared_param_names.append("weight")


class ParallelMixin:
    """What a model adds to transformers' own distribution of models."""

    def _validate_parallel_plan(self, plan: dict, supported_styles: Any, plan_name: str, names: Any = None) -> None:
        """Refuses a rule that names nothing, which transformers would only warn of."""
        super()._validate_parallel_plan(plan, supported_styles, plan_name, names)  # type: ignore[misc]
        known = {name for name, _ in (*self.named_modules(), *self.named_parameters())}  # type: ignore[attr-defined]
        unmatched = sorted(set(plan) - {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in known})
        if unmatched:
            raise ParallelError(
                f"{plan_name} has rules for {unmatched}, which {type(self).__name__} does not have; layers are called "
                "model.backbone.layers.*"
            )

    def _expand_parallel_plan(self, plan: dict) -> dict:
        """A rule of the config, which names all layers, holds in those whose own parts have it."""
        expanded = super()._expand_parallel_plan(plan)  # type: ignore[misc]
        is_expert_plan = any(style in EP_STYLES for style in plan.values())
        config, kind = self.config, "ep_plan" if is_expert_plan else "tp_plan"  # type: ignore[attr-defined]
        common, own = getattr(config, f"base_model_{kind}") or {}, config.layer_plans(kind)
        parameters = {name for name, _ in self.named_parameters()}  # type: ignore[attr-defined]

        def holds(name: str, style: str) -> bool:
            place = re.match(r"(?:model\.)?backbone\.layers\.(\d+)\.(.+)", name)
            if place is None:
                return True
            rule = functools.partial(_get_parameter_plan, is_weight=name in parameters)
            is_of_config = style in EP_STYLES or style == rule(f"backbone.layers.*.{place[2]}", common)
            return not is_of_config or style == rule(place[2], own[int(place[1])])

        return {name: style for name, style in expanded.items() if holds(name, style)}

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Splits the model over ranks, before weights are read, where ``distributed_config`` asks for it."""
        if distributed_config is not None and (distributed_config.pp_size or 1) > 1:
            raise ParallelError(
                f"pp_size={distributed_config.pp_size} cuts models by names of layers that this one does not have; "
                "take omnimoe.stages.pipeline_stage with torch.distributed.pipelining, or tp_size, ep_size, fsdp_size"
            )
        banks = []
        if mesh_manager is not None and distributed_config.ep_size > 1:
            plan = model._expand_parallel_plan(model.ep_plan | (distributed_config.ep_plan or {}))
            names = [name for name, style in plan.items() if style == EP_STYLES[0]]
            banks = [_DispatchedBank(model.get_submodule(name)) for name in names]
        is_sharded = mesh_manager is not None and distributed_config.dp_size > 1
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        has_tied_head = is_sharded and head is not None and bool(model.all_tied_weights_keys)
        if has_tied_head:
            # transformers wraps the embedding alone, so the root would take the head's weight for another one, with a
            # copy of its own of a part that is padded: the optimizer's step would not reach it
            head._parameters["weight"] = None
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
        if has_tied_head:
            _gather_with_embedding(head, embedding, model)
        for bank in banks:
            bank.enclose()
        return model

    def gather_sharded_state_dict_for_save(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Tied weights, gathered one by one, are one tensor again, which is written once."""
        state = super().gather_sharded_state_dict_for_save(*args, **kwargs)  # type: ignore[misc]
        for name, source in (getattr(self, "all_tied_weights_keys", None) or {}).items():
            if name in state and source in state:
                state[name] = state[source]
        return state

    def _get_static_cache_init_shape(self) -> Any:
        """None under tensor parallelism: a cache takes the heads of this rank from the first keys it gets."""
        if (getattr(self, "_tp_size", None) or 1) > 1:
            return None
        return super()._get_static_cache_init_shape()  # type: ignore[misc]
