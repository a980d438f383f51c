"""pi0: a language model that sees, and a narrower tower that draws the next actions of a robot by flow matching.

Text and pictures meet PaliGemma; the state of the robot and its next actions meet a Gemma of half the width. Both
towers have the same heads and attend together: pictures and words see each other and nothing that follows, the state
sees them and itself, actions see all of it and each other.

Source: https://arxiv.org/abs/2410.24164.
"""

from __future__ import annotations

from omnimoe import OmniMoeConfig, register_model
from omnimoe.zoo.card import Card
from omnimoe.zoo.pi0.convert import PI0

CARD = Card(
    family="pi0",
    title="pi0: PaliGemma and a narrower tower for the actions of a robot",
    paper="https://arxiv.org/abs/2410.24164",
    license=PI0.license,
    weights={"pi0": "hf-hub:lerobot/pi0_base"},
)


@register_model("pi0")
def pi0() -> OmniMoeConfig:
    """pi0, 3.2B: pictures, words and a robot's state in, its next 50 actions out."""
    published = {
        "type": "pi0",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "float32",
        "chunk_size": 50,
        "n_action_steps": 50,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": 10,
        "time_sampling_beta_alpha": 1.5,
        "time_sampling_beta_beta": 1.0,
        "time_sampling_scale": 0.999,
        "time_sampling_offset": 0.001,
        "min_period": 4e-3,
        "max_period": 4.0,
        "image_resolution": [224, 224],
    }
    return PI0.config_of(published)
