"""The real vocabularies with networks of one narrow layer, for tests that generate."""

from __future__ import annotations

import functools

import numpy as np
import torch

from omnimoe.hub import load
from omnimoe.modalities import Patches
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.tokenizers import Tokenizer, TokenizerError, load_tokenizer
from omnimoe.tokenizers.picture import PictureTokenizer
from omnimoe.tokenizers.speech import SpeechTokenizer

NANO = load("mot_nano", device="meta").config
CONFIG = NANO.replace(
    hidden_size=32, num_layers=1, attention=NANO.attention.replace(num_heads=2), max_position_embeddings=512
)
LATENT = Patches.Config(
    name="latent", channels=3, objective="flow", begin_id=9, end_id=10, placeholder_id=11, num_tokens=16
)
TRANSFUSION = CONFIG.replace(
    modalities=(*CONFIG.modalities, LATENT), mask="block_causal", bidirectional_modalities=("latent",)
)
"""The same with a picture of 16 latent rows beside the codes."""

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
SOUND = (0.5 * np.sin(np.arange(8_000) * 0.05)).astype(np.float32)
RAW = {"text": "a red apple", "image": PICTURE, "speech": SOUND}


class MeanTokenizer(Tokenizer):
    """A continuous tokenizer: the mean colours of a 4 x 4 grid, and back."""

    registry = None
    modality, channels, num_tokens, grid = "image", 3, 16, (4, 4)

    def __init__(self) -> None:
        """It has nothing to configure."""

    def encode_rows(self, raw):
        if np.ndim(raw) != 3:
            raise TokenizerError(f"a picture is (H, W, 3), got {np.shape(raw)}")
        height, width = (size // 4 * 4 for size in raw.shape[:2])
        cells = raw[:height, :width].reshape(4, height // 4, 4, width // 4, 3).mean((1, 3))
        return torch.from_numpy(cells.reshape(16, 3) / 127.5 - 1).float()

    def decode_rows(self, rows):
        cells = ((torch.as_tensor(rows).clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
        return cells.reshape(4, 4, 3).repeat(8, 0).repeat(8, 1)


@functools.cache
def narrow_tokenizers() -> dict[str, Tokenizer]:
    """The real text tokenizer, and untrained narrow networks with the real numbers of codes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"hidden_size": 20, "encoder_blocks": 1, "decoder_blocks": 1}
        return {
            "text": load_tokenizer("text"),
            "image": PictureTokenizer(PictureTokenizer.Config(**small)),
            "speech": SpeechTokenizer(SpeechTokenizer.Config(**small, frame_blocks=1)),
            "latent": MeanTokenizer(),
        }


def narrow_model(config=CONFIG) -> OmniMoeForCausalLM:
    """Fresh weights, always the same, strong enough that prompts and spans make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OmniMoeForCausalLM(config.replace(initializer_range=0.2))
        for name, parameter in model.named_parameters():
            if name.endswith("out_proj"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def eager_model(config=CONFIG) -> OmniMoeForCausalLM:
    """The same, and it opens spans and ends documents every few words."""
    model = narrow_model(config)
    likely = torch.zeros(config.vocab_size)
    begins = [part.begin_id for part in config.modalities if part.begin_id is not None]
    likely[[*begins, *(part.end_id for part in config.modalities if part.end_id is not None)]] = 5
    model.lm_head.register_forward_hook(lambda module, given, logits: logits + likely)
    return model
