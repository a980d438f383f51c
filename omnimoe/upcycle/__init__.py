"""New models from trained ones: more modalities, towers of their own, experts, and the seed's function kept."""

from omnimoe.upcycle import attention as _attention  # noqa: F401 - it says where experts in attention start
from omnimoe.upcycle import experts as _experts  # noqa: F401 - it says where experts start
from omnimoe.upcycle.keys import extend_keys
from omnimoe.upcycle.report import Measured, UpcycledWeight, UpcycleReport, measure
from omnimoe.upcycle.sources import Change, Choices, Plan, Start, start_of
from omnimoe.upcycle.start import upcycle
from omnimoe.upcycle.vocabulary import Vocabulary

__all__ = [
    "Change",
    "Choices",
    "Measured",
    "Plan",
    "Start",
    "UpcycleReport",
    "UpcycledWeight",
    "Vocabulary",
    "extend_keys",
    "measure",
    "start_of",
    "upcycle",
]
