"""Tier 4: modalities own what a token is, how it enters, what predicts it and how that is scored."""

from omnimoe.modalities.base import MODALITIES, Modality, register_modality
from omnimoe.modalities.coded_pictures import CodedPictures
from omnimoe.modalities.connected import Connected
from omnimoe.modalities.deep import Deep
from omnimoe.modalities.grid_patches import GridPatches
from omnimoe.modalities.patches import Patches
from omnimoe.modalities.timed_patches import DomainPatches, TimedPatches
from omnimoe.modalities.tokens import Tokens
from omnimoe.modalities.trajectory import Trajectory
from omnimoe.modalities.vocabulary import TokenRange

__all__ = [
    "MODALITIES",
    "CodedPictures",
    "Connected",
    "Deep",
    "DomainPatches",
    "GridPatches",
    "Modality",
    "Patches",
    "TimedPatches",
    "TokenRange",
    "Tokens",
    "Trajectory",
    "register_modality",
]
