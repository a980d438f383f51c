"""Tier 3: routers say which expert takes which row."""

from omnimoe.routers.base import ROUTERS, Router, Routing, register_router
from omnimoe.routers.by_modality import ByModalityRouter
from omnimoe.routers.expert_choice import ExpertChoiceRouter
from omnimoe.routers.faults import router_faults
from omnimoe.routers.losses import load_balance_loss, router_z_loss
from omnimoe.routers.scores import SCORES, Scorer
from omnimoe.routers.static import StaticRouter
from omnimoe.routers.top_k import TopKRouter

__all__ = [
    "ROUTERS",
    "SCORES",
    "ByModalityRouter",
    "ExpertChoiceRouter",
    "Router",
    "Routing",
    "Scorer",
    "StaticRouter",
    "TopKRouter",
    "load_balance_loss",
    "register_router",
    "router_faults",
    "router_z_loss",
]
