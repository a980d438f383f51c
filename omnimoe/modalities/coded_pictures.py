"""Pictures as discrete codes, with the autoencoder that makes and reads the codes as a part of the model.

So a checkpoint that holds both is one model: it is saved, loaded and moved as a whole. The autoencoder takes no part in
a forward over tokens and is never trained: its weights are buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import ConfigError
from omnimoe.modalities.base import register_modality
from omnimoe.modalities.tokens import Tokens
from omnimoe.tokenizers.base import Tokenizer, TokenizerError
from omnimoe.tokenizers.raster import from_signed, to_middle, to_signed
from omnimoe.tokenizers.vq_autoencoder import VqAutoencoder

_CHUNK = 4


@register_modality("coded_pictures")
class CodedPictures(Tokens):
    """A range of the vocabulary whose rows are the codes of an autoencoder."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Tokens.Config):
        """A discrete modality of pictures."""

        autoencoder: VqAutoencoder.Config = field(default_factory=VqAutoencoder.Config)
        """What makes codes of pictures and, with a decoder, pictures of codes."""
        codes: tuple[int, ...] = ()
        """The code that each row of the range stands for; where empty, row i stands for code i."""

        def __post_init__(self) -> None:
            super().__post_init__()
            num_codes, cells = self.autoencoder.num_codes, self.autoencoder.side**2
            if self.vocab_size != num_codes:
                raise ConfigError(
                    f"modality {self.name!r} has {self.vocab_size} rows, and its autoencoder {num_codes} codes; they "
                    "must be as many"
                )
            if self.num_tokens != cells:
                raise ConfigError(
                    f"a picture of modality {self.name!r} has {cells} codes, so num_tokens must be {cells}, got "
                    f"{self.num_tokens}"
                )
            if self.codes and sorted(self.codes) != list(range(num_codes)):
                raise ConfigError(f"codes of modality {self.name!r} must name each of its {num_codes} codes once")

        @property
        def has_weights(self) -> bool:
            return True

    config: CodedPictures.Config

    def __init__(self, config: CodedPictures.Config, *, hidden_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size)
        self.autoencoder = config.autoencoder.build()
        for module in self.autoencoder.modules():
            _hold(module)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures ``(B, 3, S, S)`` in [-1, 1] to local ids ``(B, n)`` int64, row by row from the top left."""
        codes = self.autoencoder.encode(pixels)
        if not self.config.codes:
            return codes
        return torch.tensor(self.config.codes, device=codes.device).argsort()[codes]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Local ids ``(B, n)`` to pictures ``(B, 3, S, S)``, nearly in [-1, 1].

        Raises:
            ValueError: if the autoencoder has no decoder.
        """
        if self.config.codes:
            ids = torch.tensor(self.config.codes, device=ids.device)[ids]
        return self.autoencoder.decode(ids)

    @property
    def tokenizer(self) -> PictureCodes:
        """The same under the interface of tokenizers, for pictures of any kind and size."""
        return PictureCodes(self)


class PictureCodes(Tokenizer):
    """Pictures to local ids and back, by the autoencoder of a model.

    A picture's shorter side is brought to the size that the model takes, and its middle is cut out.

    Args:
        of: the modality of the model.
    """

    modality = "image"
    num_tokens: int

    def __init__(self, of: CodedPictures) -> None:
        super().__init__(ConfigBase())
        self.of = of
        form = of.config.autoencoder
        self.vocab_size, self.image_size = form.num_codes, form.image_size
        self.grid, self.num_tokens = (form.side, form.side), form.side**2

    @property
    def device(self) -> torch.device:
        """Where the autoencoder computes; what comes out is on the CPU."""
        return self.of.autoencoder.quant_conv.weight.device

    def encode(self, raw: Any) -> Tensor:
        """One picture to ids ``(n,)``.

        Args:
            raw: a path, a PIL image, or a uint8 array or tensor ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``.

        Raises:
            TokenizerError: if ``raw`` is not a picture.
        """
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Any]) -> Tensor:
        """Pictures to ids ``(B, n)``."""
        if isinstance(raws, str | PathLike | Image.Image):
            raise TokenizerError("encode_batch takes a sequence of pictures; use encode for one")
        found = [torch.empty(0, self.num_tokens, dtype=torch.int64)]
        for start in range(0, len(raws), _CHUNK):
            pictures = [to_middle(raw, self.image_size) for raw in raws[start : start + _CHUNK]]
            found.append(self.of.encode(to_signed(np.stack(pictures)).to(self.device)).cpu())
        return torch.cat(found)

    def decode(self, ids: Any) -> np.ndarray:
        """Ids ``(n,)`` of a whole picture to ``(S, S, 3)`` uint8.

        Raises:
            TokenizerError: if the number of ids does not fit, one is out of range, or there is no decoder.
        """
        ids = self.check_ids(ids)
        if ids.ndim != 1:
            raise TokenizerError(f"decode takes the ids of one picture, not {tuple(ids.shape)}; call it once a picture")
        if self.of.autoencoder.decoder is None:
            raise TokenizerError("this model was published without the decoder of its codes, so they stay codes")
        return from_signed(self.of.decode(ids[None].to(self.device)))[0]


def _hold(module: nn.Module) -> None:
    """Makes buffers of a module's own parameters."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.data)


__all__ = ["CodedPictures", "PictureCodes"]
