"""Connectors: what turns rows of an encoder's features into rows of the model."""

from __future__ import annotations

from omnimoe.connectors.base import CONNECTORS, Connector, register_connector
from omnimoe.connectors.latent_queries import LatentQueries
from omnimoe.connectors.pool import Pool
from omnimoe.connectors.projections import MLP, AsIs, Linear
from omnimoe.connectors.q_former import QFormer

__all__ = ["CONNECTORS", "MLP", "AsIs", "Connector", "LatentQueries", "Linear", "Pool", "QFormer", "register_connector"]
