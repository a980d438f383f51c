"""Tier 3: routers say which expert takes which row."""

from omnimoe.routers.attributes import AttributeRouter
from omnimoe.routers.auxiliary import AuxiliaryRouter
from omnimoe.routers.base import ROUTERS, Router, Routing, Slots, join_routings, register_router
from omnimoe.routers.by_modality import ByModalityRouter
from omnimoe.routers.depth import DEPTH_ROUTERS, DepthRouter, register_depth_router
from omnimoe.routers.expert_choice import ExpertChoiceRouter, ExpertThresholdRouter
from omnimoe.routers.faults import router_faults
from omnimoe.routers.hash import HashRouter
from omnimoe.routers.losses import (
    entropy_losses,
    importance_loss,
    load_balance_loss,
    load_loss,
    mutual_information,
    orthogonality_loss,
    router_z_loss,
)
from omnimoe.routers.scores import SCORES, Scorer
from omnimoe.routers.soft import SoftRouter
from omnimoe.routers.sparse_mixer import SparseMixerRouter
from omnimoe.routers.static import StaticRouter
from omnimoe.routers.top_k import TopKRouter

__all__ = [
    "DEPTH_ROUTERS",
    "ROUTERS",
    "SCORES",
    "AttributeRouter",
    "AuxiliaryRouter",
    "ByModalityRouter",
    "DepthRouter",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "HashRouter",
    "Router",
    "Routing",
    "Scorer",
    "Slots",
    "SoftRouter",
    "SparseMixerRouter",
    "StaticRouter",
    "TopKRouter",
    "entropy_losses",
    "importance_loss",
    "join_routings",
    "load_balance_loss",
    "load_loss",
    "mutual_information",
    "orthogonality_loss",
    "register_depth_router",
    "register_router",
    "router_faults",
    "router_z_loss",
]
