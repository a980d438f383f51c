"""The activations of ``omnimoe.ops.experts_mlp.activations`` and their slopes, by the numbers of ``CODES``."""

from __future__ import annotations

from omnimoe.ops.triton.language import jit, tl

# A kernel may read none of Python's values but constants, so the numbers and limits are written out; a test compares.


@jit
def activate(x, KIND: tl.constexpr):
    """The value and the slope of a function of one argument; NaN stays NaN."""
    if KIND == 1:  # gelu
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * share
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 2:  # gelu_tanh; (1 + tanh(u)) / 2 = sigmoid(2 u)
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * share
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == 3:  # relu
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif KIND == 4:  # relu2
        positive = tl.where(x < 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    else:  # silu
        share = tl.sigmoid(x)
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    return value, slope


@jit
def gate_slopes(gate, up, KIND: tl.constexpr):
    """``activation(gate) * up``, and its derivatives by both."""
    if KIND == 5:  # clamped_silu
        held_gate = tl.where(gate > 7.0, 7.0, gate)
        held_up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
        share = tl.sigmoid(1.702 * held_gate)
        value = held_gate * share
        slope = share * (1.0 + 1.702 * held_gate * (1.0 - share))
        by_gate = tl.where(gate > 7.0, 0.0, slope * held_up)
        by_up = tl.where((up > 7.0) | (up < -7.0), 0.0, value)
        product = value * held_up
    else:
        value, slope = activate(gate, KIND)
        by_gate = slope * up
        by_up = value
        product = value * up
    return product, by_gate, by_up
