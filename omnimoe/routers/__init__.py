"""Tier 3: routers say which expert takes which row."""

from omnimoe.routers.base import ROUTERS, Router, Routing, register_router
from omnimoe.routers.by_modality import ByModalityRouter
from omnimoe.routers.expert_choice import ExpertChoiceRouter
from omnimoe.routers.losses import load_balance_loss, router_z_loss
from omnimoe.routers.static import StaticRouter
from omnimoe.routers.top_k import TopKRouter

__all__ = [
    "ROUTERS",
    "ByModalityRouter",
    "ExpertChoiceRouter",
    "Router",
    "Routing",
    "StaticRouter",
    "TopKRouter",
    "load_balance_loss",
    "register_router",
    "router_z_loss",
]
