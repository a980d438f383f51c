"""Tier 1: pure functions on tensors, without parameters and without configs.

Each op is a folder whose ``__init__`` holds the contract. Where an op has several implementations it also chooses among
them, and ``reference`` is the plain PyTorch definition that all others must match.
"""

from omnimoe.ops._backends import BACKENDS, BackendError, backend, missing_kernels
from omnimoe.ops.attend import attend
from omnimoe.ops.combine import combine
from omnimoe.ops.experts_mlp import ACTIVATIONS, GATED, experts_mlp
from omnimoe.ops.grouped_mm import grouped_mm
from omnimoe.ops.grouped_wgrad import grouped_wgrad
from omnimoe.ops.linear import linear
from omnimoe.ops.permute import permute
from omnimoe.ops.rms_norm import rms_norm
from omnimoe.ops.rope import rope
from omnimoe.ops.route_plan import RoutePlan, route_plan
from omnimoe.ops.selective_scan import selective_scan

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "GATED",
    "BackendError",
    "RoutePlan",
    "attend",
    "backend",
    "combine",
    "experts_mlp",
    "grouped_mm",
    "grouped_wgrad",
    "linear",
    "missing_kernels",
    "permute",
    "rms_norm",
    "rope",
    "route_plan",
    "selective_scan",
]
