"""Tier 4: what stands in a block in the place of the feed-forward network."""

from omnimoe.experts.base import EXPERTS, Experts, register_expert, register_experts
from omnimoe.experts.feed_forward import FeedForward
from omnimoe.experts.none import NoExperts
from omnimoe.experts.routed import RoutedExperts
from omnimoe.experts.routed_attention import RoutedAttention, RoutedProjections, RoutedStateSpace
from omnimoe.experts.sub_norm import SubNormFeedForward

__all__ = [
    "EXPERTS",
    "Experts",
    "FeedForward",
    "NoExperts",
    "RoutedAttention",
    "RoutedExperts",
    "RoutedProjections",
    "RoutedStateSpace",
    "SubNormFeedForward",
    "register_expert",
    "register_experts",
]
