"""What transformers asks of a model: loading, saving, initialisation, layers that can be recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from omnimoe.attend import check_attention
from omnimoe.backbone import Block
from omnimoe.encode import Encodes
from omnimoe.experts_interface import NAME as OWN_EXPERTS
from omnimoe.experts_interface import check_experts
from omnimoe.guarded import GuardedFiles
from omnimoe.layers import BaseAttention, SineGrid
from omnimoe.model_config import OmniMoeConfig
from omnimoe.parallel import ParallelMixin
from omnimoe.recompute import recompute
from omnimoe.routers import Router


class Layer(GradientCheckpointingLayer, Block):
    """A block of the backbone; what transformers asks of one is that it can be recomputed in backward."""


class OmniMoePreTrainedModel(ParallelMixin, Encodes, GuardedFiles):
    """Loading, saving and initialisation, from transformers."""

    config: OmniMoeConfig
    config_class = OmniMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": BaseAttention, "router_logits": Router}
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for ``@use_experts_implementation`` in the file of a model; our experts are in another."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our own ops unless another implementation is asked for."""
        check_experts(requested_experts)
        return super().get_correct_experts_implementation(requested_experts or OWN_EXPERTS)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.modules():
            if isinstance(module, Layer):
                module._gradient_checkpointing_func = partial(recompute, gradient_checkpointing_func)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        check_attention(attn_implementation, {*ALL_ATTENTION_FUNCTIONS})
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name, start in getattr(module, "initial", {}).items():
            parameter = getattr(module, name, None)
            if parameter is None:
                continue
            if callable(start):
                init.copy_(parameter, start(parameter))
            elif start == "normal":
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
            else:
                init.constant_(parameter, float(start))
        if isinstance(module, Router | SineGrid):
            for name, start in module.initial_buffers().items():
                init.copy_(getattr(module, name), start)


__all__ = ["Layer", "OmniMoePreTrainedModel"]
