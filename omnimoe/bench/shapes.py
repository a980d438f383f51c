"""Named sizes of experts' layers: those of published models for a GPU, and copies cut down to a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer of gated experts.

    Args:
        tokens: T.
        hidden_size: D.
        intermediate_size: F, of one expert.
        num_experts: E.
        top_k: K, experts a token.
        about: what it is.
        is_decoding: few tokens, forward only; weights are what has to be moved.
    """

    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    about: str
    is_decoding: bool = False

    @property
    def rows(self) -> int:
        """R, routed rows."""
        return self.tokens * self.top_k

    @property
    def rows_per_expert(self) -> float:
        """R / E, the mean."""
        return self.rows / self.num_experts


FULL = {
    "mixtral_8x7b": Shape(32768, 4096, 14336, 8, 2, "Mixtral-8x7B"),
    "qwen3_30b_a3b": Shape(32768, 2048, 768, 128, 8, "Qwen3-30B-A3B"),
    "olmoe_1b_7b": Shape(32768, 2048, 1024, 64, 8, "OLMoE-1B-7B"),
    "dsv3_ep32": Shape(32768, 7168, 2048, 8, 1, "DeepSeek-V3, one of 32 ranks"),
    "moma_1p4b_4t4i": Shape(32768, 2048, 5632, 8, 1, "MoMa 1.4B, 4 text and 4 image experts"),
    "bagel_7b_mot": Shape(32768, 3584, 18944, 2, 1, "BAGEL-7B-MoT, two towers"),
    "sonic_7b": Shape(24576, 1536, 256, 128, 8, "the 7B model of SonicMoE's paper"),
    "sonic_30b": Shape(32768, 4096, 512, 128, 8, "the 30B model of SonicMoE's paper"),
    "qwen3_30b_a3b_decode": Shape(64, 2048, 768, 128, 8, "Qwen3-30B-A3B, 64 sequences decoding", True),
    "olmoe_1b_7b_decode": Shape(1, 2048, 1024, 64, 8, "OLMoE-1B-7B, one sequence decoding", True),
}
"""For a GPU."""

MINI = {
    "mixtral_8x7b_mini": Shape(128, 512, 1792, 8, 2, "Mixtral-8x7B, widths / 8"),
    "olmoe_1b_7b_mini": Shape(256, 1024, 512, 64, 8, "OLMoE-1B-7B, widths / 2"),
    "qwen3_30b_a3b_mini": Shape(256, 1024, 384, 128, 8, "Qwen3-30B-A3B, widths / 2"),
    "dsv3_mini": Shape(256, 896, 256, 256, 8, "DeepSeek-V3, widths / 8"),
    "moma_1p4b_4t4i_mini": Shape(1024, 768, 2048, 8, 1, "MoMa 1.4B, 4 text and 4 image experts, narrower"),
    "bagel_7b_mot_mini": Shape(1024, 448, 2368, 2, 1, "BAGEL-7B-MoT, two towers, widths / 8"),
    "moma_tiny": Shape(512, 256, 704, 8, 1, "the smallest: a second of work on one core"),
    "qwen3_30b_a3b_mini_decode": Shape(8, 1024, 384, 128, 8, "Qwen3-30B-A3B, widths / 2, 8 sequences decoding", True),
    "olmoe_1b_7b_mini_decode": Shape(1, 1024, 512, 64, 8, "OLMoE-1B-7B, widths / 2, one sequence decoding", True),
}
"""For a CPU."""

SHAPES = {**FULL, **MINI}
ROUTINGS = ("uniform", "zipf", "one-hot")
"""How rows fall to experts: evenly; the n-th expert 1/n as often as the first; all to the same few."""


def default_shapes(device: str) -> list[str]:
    """The names that a device runs if none are given."""
    return list(FULL if device.startswith("cuda") else MINI)
