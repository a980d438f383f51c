"""Published checkpoints and ours: tables between their tensors, read both ways.

A family of the zoo declares a :class:`Converter`: which files it serves, how their config becomes ours, and a table of
rules between parameter names. ``omnimoe.from_pretrained`` then loads such a checkpoint as it lies there,
``omnimoe convert`` writes it as ours, and back.
"""

from omnimoe.convert.changes import Chain, Change, Deinterleave, Permute, Reshape, Transpose
from omnimoe.convert.converter import CONVERTERS, Converter, find_converter, register_converter
from omnimoe.convert.folders import to_omnimoe, to_published
from omnimoe.convert.published import Published
from omnimoe.convert.rules import Part, Rows, Rule, RuleError, bank, make_plan, rename

__all__ = [
    "CONVERTERS",
    "Chain",
    "Change",
    "Converter",
    "Deinterleave",
    "Part",
    "Permute",
    "Published",
    "Reshape",
    "Rows",
    "Rule",
    "RuleError",
    "Transpose",
    "bank",
    "find_converter",
    "make_plan",
    "register_converter",
    "rename",
    "to_omnimoe",
    "to_published",
]
