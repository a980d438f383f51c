"""Routed experts beside other libraries' in one run: what ``omnimoe bench`` and ``benchmarks/test_ops.py`` do.

``shapes`` names the sizes, ``problem`` draws operands, ``peers`` holds who computes, ``measure`` holds each against
float64 and then times them in turn, ``memory`` asks what they keep, ``run`` puts it together.
"""
