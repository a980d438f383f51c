"""Any vision or audio encoder of transformers, from a local folder or the Hub.

Of a model with several towers (CLIP, SigLIP, Whisper) the one that sees or hears is kept. Input is prepared by the
model's own processor, whose file must lie beside the weights. Weights are safetensors, and no code is taken from a
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.raw import square_pictures, waveforms_at

_ONLY_IN_TRAINING = ("masked_spec_embed", "mask_token")


class HFEncoder(Encoder):
    """What vision and audio share: where the model comes from, and which of its parts is used."""

    towers: tuple[str, ...] = ()
    """Attributes under which models of several towers keep this one."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """An encoder of transformers."""

        source: str = ""
        """A local folder or an id on the Hub."""
        revision: str | None = None
        """Branch, tag or commit, on the Hub; pin a commit for what is to stay the same."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.source:
                raise ConfigError("source must name a local folder or an id on the Hub, got ''")

    config: HFEncoder.Config

    def __init__(self, config: HFEncoder.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        from transformers import AutoConfig, AutoModel

        given = {"revision": config.revision, "trust_remote_code": False}
        try:
            missing: set[str] = set()
            if weights:
                whole, report = AutoModel.from_pretrained(
                    config.source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **given
                )
                missing = {name for name in report["missing_keys"] if not name.endswith(_ONLY_IN_TRAINING)}
            else:
                whole = AutoModel.from_config(AutoConfig.from_pretrained(config.source, **given))
            self._processor = self._load_processor(config.source, **given)
        except (OSError, ValueError, RuntimeError) as error:
            raise EncoderError(f"no encoder can be loaded from {config.source!r}: {error}") from error
        absent = sorted(name for name in missing if "pooler" not in name.split("."))
        if absent:
            raise EncoderError(f"the weights in {config.source!r} lack {', '.join(absent[:3])} of {len(absent)}")
        # a pooler that the file does not hold would be random
        self.pools = not missing
        tower = next((getattr(whole, name) for name in self.towers if hasattr(whole, name)), None)
        if tower is None and getattr(whole.config, "is_encoder_decoder", False):
            tower = whole.get_encoder()
        self.network = whole if tower is None else tower
        form = self.network.config
        self.hidden_size = form.hidden_size if hasattr(form, "hidden_size") else form.hidden_sizes[-1]
        self.freeze()

    @staticmethod
    def _load_processor(source: str, **given: Any) -> Any:
        raise NotImplementedError("an encoder of transformers names the class that prepares its input")


@register_encoder("hf_vision")
class HFVision(HFEncoder):
    """A vision encoder that takes ``pixel_values``: ViT, DINOv2, the towers of CLIP and SigLIP, Swin, ConvNeXt."""

    kind = "image"
    towers = ("vision_model", "vision_tower", "visual")

    def __init__(self, config: HFVision.Config, *, weights: bool = True) -> None:
        super().__init__(config, weights=weights)
        side = getattr(self.network.config, "image_size", None)
        if not isinstance(side, int):
            sizes = getattr(self._processor, "crop_size", None) or self._processor.size
            side = max(value for value in dict(sizes).values() if value)
        self._side = side

    def prepare(self, raws: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        """Pictures to ``pixel_values (B, 3, H, W)``, as the model's own processor makes them.

        Args:
            raws: B paths, PIL images, or uint8 arrays or tensors ``(H, W, 3)``; each is padded to a square, on white.
            options: none.

        Raises:
            EncoderError: if one is not a picture.
        """
        pictures = [Image.fromarray(picture) for picture in square_pictures(raws, self._side)]
        return {"pixel_values": self._processor(images=pictures, return_tensors="pt")["pixel_values"]}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Pixels to rows ``(B, n, C)``, one a patch from the top left, without class or register tokens.

        The pooled features are those the model itself pools, or the mean of the rows where it does not.
        """
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        out = self.network(pixel_values=pixels)
        hidden = out.last_hidden_state
        if hidden.ndim == 4:  # a convolutional network: (B, C, rows, columns)
            grid = (hidden.shape[2], hidden.shape[3])
            rows = hidden.flatten(2).transpose(1, 2)
        else:
            grid = self._grid(pixels, hidden)
            rows = hidden[:, hidden.shape[1] - grid[0] * grid[1] :]
        pooled = getattr(out, "pooler_output", None) if self.pools else None
        pooled = rows.mean(1) if pooled is None else pooled.flatten(1)
        return Features(rows=rows, pooled=pooled, grid=grid)

    def _grid(self, pixels: Tensor, hidden: Tensor) -> tuple[int, int]:
        """Rows and columns of what a transformer gives; class and register tokens come before the patches."""
        patch = getattr(self.network.config, "patch_size", None)
        if isinstance(patch, int):
            grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
            if grid[0] * grid[1] <= hidden.shape[1]:
                return grid
        side = math.isqrt(hidden.shape[1])
        if side * side != hidden.shape[1]:
            raise EncoderError(f"{type(self.network).__name__} gives {hidden.shape[1]} rows, which are no square grid")
        return side, side

    @staticmethod
    def _load_processor(source: str, **given: Any) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(source, **given)


@register_encoder("hf_audio")
class HFAudio(HFEncoder):
    """An audio encoder: Whisper's, wav2vec 2.0, HuBERT, others that take ``input_features`` or ``input_values``."""

    kind = "audio"
    towers = ("audio_model", "audio_tower")

    def __init__(self, config: HFAudio.Config, *, weights: bool = True) -> None:
        super().__init__(config, weights=weights)
        self.sample_rate = int(self._processor.sampling_rate)

    def prepare(self, raws: Sequence[Any], *, sample_rate: int = 16_000, **options: Any) -> dict[str, Tensor]:
        """Clips to what the model's own feature extractor makes of them, and ``num_samples (B,)``.

        Args:
            raws: B clips ``(n,)``, floating point in [-1, 1] or int16, one channel.
            sample_rate: of the clips in Hz; they are resampled to the model's.
            options: none.

        Raises:
            EncoderError: if one is empty or not finite.
        """
        clips = [clip.numpy() for clip in waveforms_at(raws, sample_rate, self.sample_rate)]
        heard = self._processor(
            clips,
            sampling_rate=self.sample_rate,
            padding="max_length" if self._is_windowed else True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        num_samples = torch.tensor([len(clip) for clip in clips])
        return {**heard, "num_samples": num_samples}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Prepared clips to rows ``(B, n, C)``, one a moment, and their mean; padding is masked."""
        name = "input_features" if "input_features" in inputs else "input_values"
        heard = inputs[name].to(self.device, self.dtype)
        given = inputs.get("attention_mask")
        given = None if given is None else given.to(self.device)
        # a model without a norm over each layer's features was trained with zeros for padding and without a mask
        is_masked = getattr(self.network.config, "feat_extract_norm", "layer") == "layer" and not self._is_windowed
        masks = {"attention_mask": given} if is_masked and given is not None else {}
        rows = self.network(heard, **masks).last_hidden_state
        mask = self._mask(inputs["num_samples"].to(self.device), inputs, rows)
        weights = mask.unsqueeze(-1).to(rows.dtype)
        return Features(rows=rows, pooled=(rows * weights).sum(1) / weights.sum(1).clamp_min(1), mask=mask)

    @property
    def _is_windowed(self) -> bool:
        """Whether every clip fills one window, as Whisper's do."""
        return hasattr(self._processor, "nb_max_frames")

    def _mask(self, num_samples: Tensor, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        if hasattr(self.network, "_get_feat_extract_output_lengths") and not self._is_windowed:
            counts = self.network._get_feat_extract_output_lengths(num_samples)
        elif self._is_windowed:
            window = self._processor.n_samples
            counts = (num_samples * rows.shape[1] + window - 1) // window
        else:
            counts = torch.full_like(num_samples, rows.shape[1])
        return torch.arange(rows.shape[1], device=rows.device) < counts.clamp(1, rows.shape[1]).unsqueeze(1)

    @staticmethod
    def _load_processor(source: str, **given: Any) -> Any:
        from transformers import AutoFeatureExtractor

        return AutoFeatureExtractor.from_pretrained(source, **given)
