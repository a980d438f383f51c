"""Tier 2: modules with parameters. A weight site is a bank of copies; rows say which copy each token meets."""

from omnimoe.layers.asked import Asked
from omnimoe.layers.attention import ATTENTIONS, Attention, BaseAttention, register_attention
from omnimoe.layers.bank import Bank, TowerMap, num_copies, resolve_towers
from omnimoe.layers.keys import KEY_RULES, register_key_rule
from omnimoe.layers.latent_attention import LatentAttention
from omnimoe.layers.linear import BankLinear, ExpertLinear, Head
from omnimoe.layers.masks import MASK_RULES, AttentionMask, register_mask_rule
from omnimoe.layers.mlp import BankMLP
from omnimoe.layers.norm import BankHeadLayerNorm, BankLayerNorm, BankRMSNorm, Norm
from omnimoe.layers.position_bias import POSITION_BIASES, PositionBias, SpanTables, register_position_bias
from omnimoe.layers.reader_attention import ReaderAttention
from omnimoe.layers.rope import Rope
from omnimoe.layers.rope_scaling import ROPE_SCALINGS, RopeScaling, register_rope_scaling
from omnimoe.layers.rows import RowLayout
from omnimoe.layers.sine_grid import SineGrid
from omnimoe.layers.sink_attention import SinkAttention
from omnimoe.layers.state_space import StateSpace
from omnimoe.layers.sub_norm import NormedLinear, SubNormAttention

__all__ = [
    "ATTENTIONS",
    "KEY_RULES",
    "MASK_RULES",
    "POSITION_BIASES",
    "ROPE_SCALINGS",
    "Asked",
    "Attention",
    "AttentionMask",
    "Bank",
    "BankHeadLayerNorm",
    "BankLayerNorm",
    "BankLinear",
    "BankMLP",
    "BankRMSNorm",
    "BaseAttention",
    "ExpertLinear",
    "Head",
    "LatentAttention",
    "Norm",
    "NormedLinear",
    "PositionBias",
    "ReaderAttention",
    "Rope",
    "RopeScaling",
    "RowLayout",
    "SineGrid",
    "SinkAttention",
    "SpanTables",
    "StateSpace",
    "SubNormAttention",
    "TowerMap",
    "num_copies",
    "register_attention",
    "register_key_rule",
    "register_mask_rule",
    "register_position_bias",
    "register_rope_scaling",
    "resolve_towers",
]
