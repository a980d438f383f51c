"""Features of a pretrained encoder, brought to the model's width by a connector: a modality that only enters.

Features can be computed once and passed (``encoder.encode(pictures)``), or the modality runs the encoder itself on what
``encoder.prepare(pictures)`` gives. A frozen encoder is held beside the model: its weights are in no checkpoint, its
name is in the config, and it is loaded when first needed. An encoder that is trained is a part of the model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from omnimoe.config import ConfigError
from omnimoe.connectors import MLP, Connector
from omnimoe.encoders import Encoder, Features
from omnimoe.layers import SineGrid
from omnimoe.modalities.base import Modality, register_modality


@register_modality("connected")
class Connected(Modality):
    """Encoder and connector; no head: labels at its positions are ignored."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Modality.Config):
        """A modality of encoder features."""

        channels: int = 0
        """Width C of the features: the encoder's ``hidden_size``."""
        connector: Connector.Config = field(default_factory=MLP.Config)
        """What brings them to the model's width."""
        encoder: Encoder.Config | None = None
        """The encoder that raw inputs go through; None where features are always computed outside."""
        max_side: int = 0
        """Rows along a side of the largest picture that a table of fixed positions is for, added to what the connector
        gives; 0 for none. The encoder must say where each row stands."""
        trains_encoder: bool = False
        """Make the encoder a part of the model: trained, and saved with it. Otherwise it is frozen and not saved."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.channels < 1:
                raise ConfigError(
                    f"modality {self.name!r} needs the width of its features: channels=encoder.hidden_size, "
                    f"got {self.channels}"
                )
            if self.trains_encoder and self.encoder is None:
                raise ConfigError(f"modality {self.name!r} trains an encoder and names none; pass encoder=...")

        @property
        def is_input_only(self) -> bool:
            return True

        def active_params(self, hidden_size: int) -> int:
            """Of the connector; what an encoder costs does not depend on the model."""
            return self.connector.active_params(self.channels, hidden_size)

    config: Connected.Config

    def __init__(self, config: Connected.Config, *, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.connector = config.connector.build(channels=config.channels, hidden_size=hidden_size)
        self.place = SineGrid(config.max_side, hidden_size) if config.max_side else None
        # In a list, so that it is no submodule: neither in the state dict nor among the parameters.
        self._beside: list[Encoder] = []
        if config.trains_encoder:
            self.encoder = self._build()

    def get_encoder(self) -> Encoder:
        """The encoder, loaded on first use.

        Raises:
            ValueError: if the config names none.
            EncoderError: if its weights or a library are missing.
        """
        if self.config.trains_encoder:
            return self.encoder
        if not self._beside:
            if self.config.encoder is None:
                raise ValueError(
                    f"modality {self.config.name!r} has no encoder; pass features, or declare encoder=encoder.config"
                )
            encoder = self.config.encoder.build()
            self._check_width(encoder)
            weight = next(self.connector.parameters())
            self._beside.append(encoder.to(weight.device))
        return self._beside[0]

    def embed(self, inputs: Any, timesteps: Tensor | None = None) -> Tensor:
        """Features or prepared raw inputs of S spans to the rows of all their positions.

        Args:
            inputs: ``(S, n, C)``, or :class:`~omnimoe.encoders.Features` if spans differ in length, or what the
                encoder's ``prepare`` gives; spans in order of batch and time.
            timesteps: must be None: features carry no noise.

        Returns:
            ``(N, D)``, span after span, without padding.

        Raises:
            ValueError: if ``inputs`` have another form.
        """
        if timesteps is not None:
            raise ValueError(f"modality {self.config.name!r} takes no timesteps: its rows are features without noise")
        x, mask, places = self._features(inputs)
        rows = self.connector(x.to(next(self.parameters(), x).dtype), mask)
        if self.place is not None:
            if places is None or rows.shape[1] != places.shape[1]:
                raise ValueError(
                    f"modality {self.config.name!r} adds the place of each row, which its features do not tell; pass "
                    "Features with places, or what the encoder's prepare gives, and a connector that keeps all rows"
                )
            rows = rows + self.place(places.to(rows.device)).to(rows.dtype)
        if self.config.trains_encoder and not isinstance(inputs, Mapping):
            # an encoder that was not run takes part too: its gradients are zero, not missing
            rows = rows + 0 * sum(parameter.sum() for parameter in self.encoder.parameters()).to(rows.dtype)
        return rows.flatten(0, 1) if mask is None else rows[self.connector.row_mask(mask)]

    def row_counts(self, inputs: Any) -> list[int]:
        """How many positions each span of ``inputs`` takes; see :meth:`embed`."""
        shapes = self.shapes_of(inputs) if isinstance(inputs, Mapping) else None
        if shapes is not None:  # the encoder need not run
            return [self.connector.num_rows(count) for count in shapes.prod(-1).tolist()]
        x, mask, _ = self._features(inputs)
        if mask is None:
            return [self.connector.num_rows(x.shape[1])] * len(x)
        return self.connector.row_mask(mask).sum(1).tolist()

    def span_ids(self, inputs: Any) -> list[Tensor]:
        """The ids that stand for each span of ``inputs``: begin, placeholders, end, ``(n,)`` int64 on the CPU.

        A clip, a span of several rows in time, has those of the last of ``more_ids``, where there are any.

        Raises:
            ValueError: if the config has no placeholder_id.
        """
        if self.config.placeholder_id is None:
            raise ValueError(f"modality {self.config.name!r} has no placeholder_id, so no ids can stand for it")
        counts, shapes = self.row_counts(inputs), self.shapes_of(inputs)
        is_clip = [False] * len(counts) if shapes is None else (shapes[:, 0] > 1).tolist()
        spans = []
        for count, moves in zip(counts, is_clip, strict=True):
            begin, end, place = self.config.ids_of_spans[-1 if moves else 0]
            spans.append([begin, *[place] * count, end])
        return [torch.tensor([token for token in span if token is not None]) for span in spans]

    def repeated(self, given: Any, counts: Sequence[int], times: int) -> Any:
        """Spans go along with the sequence whose positions they fill; None where they fill no whole sequences."""
        ends, filled = list(accumulate(counts)), list(accumulate(self.row_counts(given)))
        stops = [0, *(bisect_right(filled, end) for end in ends)]
        if filled and ends != [filled[stop - 1] if stop else 0 for stop in stops[1:]]:
            return None
        index = [place for span in pairwise(stops) for _ in range(times) for place in range(*span)]
        if isinstance(given, Mapping):
            return {name: held[index] for name, held in given.items()}
        return given[index]

    def shapes_of(self, given: Any) -> Tensor | None:
        """Read off features that tell them, or by the encoder off what it prepared."""
        if isinstance(given, Features):
            return given.shapes
        tell = getattr(self.get_encoder(), "shapes", None) if isinstance(given, Mapping) else None
        return None if tell is None else torch.tensor(tell(given))

    def _features(self, inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if isinstance(inputs, Mapping):
            inputs = self.get_encoder()(inputs)
        x, mask, places = inputs, None, None
        if isinstance(inputs, Features):
            x, mask, places = inputs.rows, inputs.mask, inputs.places
        name, width = self.config.name, self.config.channels
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != width or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"features[{name!r}] must be (spans, n, {width}) floating point, Features, or what the encoder's "
                f"prepare gives, got {got}"
            )
        if mask is not None and mask.device.type == "cpu" and not bool(mask.any(1).all()):
            empty = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"features[{name!r}]: span {empty} is all padding; leave it out")
        return x, mask, places

    def _build(self) -> Encoder:
        """The encoder as a part of the model: without weights where a checkpoint will fill it, that is on meta."""
        config = self.config.encoder
        assert config is not None
        is_meta = torch.get_default_device().type == "meta"
        encoder = config.build(weights=not is_meta)
        self._check_width(encoder)
        if not is_meta:
            # transformers initialises every module that it does not know to be filled
            for part in (*encoder.modules(), *encoder.parameters(), *encoder.buffers()):
                part._is_hf_initialized = True
        return encoder.freeze(False)

    def _check_width(self, encoder: Encoder) -> None:
        if encoder.hidden_size != self.config.channels:
            raise ConfigError(
                f"modality {self.config.name!r} has channels {self.config.channels}, and its encoder gives "
                f"{encoder.hidden_size}"
            )

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # a move or a cast of the model takes the encoder beside it along
        for encoder in self._beside:
            encoder._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)
