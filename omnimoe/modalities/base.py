"""What a modality brings to the model: rows in, predictions and unreduced losses out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from omnimoe.config import Config as ConfigBase
from omnimoe.config import Configurable, register
from omnimoe.registry import Registry

MODALITIES: Registry = Registry("modality")


def register_modality(name: str, *, exist_ok: bool = False):
    """Decorator that files a :class:`Modality` class under ``name``."""
    return register(MODALITIES, name, exist_ok=exist_ok)


class Modality(nn.Module, Configurable):
    """A continuous modality: its rows come as vectors in ``features[name]`` and leave through its own head.

    Contract: ``embed(inputs (n, C), timesteps (n,) or None) -> (n, D)``, ``head(x (n, D)) -> (n, C)``,
    ``loss(outputs (n, C), targets (n, C)) -> (n,)`` float32. Discrete modalities are
    :class:`~omnimoe.modalities.Tokens`.
    """

    registry: ClassVar[Registry] = MODALITIES

    @dataclass(frozen=True, kw_only=True)
    class Config(ConfigBase):
        """A modality."""

        name: str
        """The modality's name, unique in the model."""
        begin_id: int | None = None
        """Token that opens a span, an id of the whole vocabulary; None for the base modality."""
        end_id: int | None = None
        """Token that closes a span."""
        num_tokens: int | None = None
        """Positions of every span, where that is fixed."""
        frame_size: int = 1
        """Positions of a frame: a span whose length is free ends after whole frames."""
        loss_weight: float = 1.0
        """Weight of this modality's losses in ``out.loss``."""
        placeholder_id: int | None = None
        """Token that stands at the positions of a continuous modality; lets modality ids be read off input ids."""

        more_ids: tuple[tuple[int | None, int | None, int | None], ...] = ()
        """Begin token, end token and placeholder of each further kind of span: of clips beside those of pictures."""

        @property
        def ids_of_spans(self) -> tuple[tuple[int | None, int | None, int | None], ...]:
            """Begin token, end token and placeholder of every kind of span."""
            return ((self.begin_id, self.end_id, self.placeholder_id), *self.more_ids)

        @property
        def is_discrete(self) -> bool:
            """Whether the modality owns rows of the vocabulary."""
            return False

        @property
        def is_input_only(self) -> bool:
            """Whether rows only enter: no head, no targets, and features in whatever form ``embed`` takes."""
            return False

        @property
        def has_own_form(self) -> bool:
            """Whether features come in whatever form ``embed`` takes, and not as rows ``(n, C)``."""
            return self.is_input_only

        @property
        def has_weights(self) -> bool:
            """Whether the model holds a module of the modality; table and head of discrete ones are the model's."""
            return not self.is_discrete

        def active_params(self, hidden_size: int) -> int:
            """Weights in matrix products that one of its rows meets on the way in and out."""
            return 0

    def embed(self, inputs: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """``(n, C)`` to ``(n, D)``."""
        raise TypeError(f"{type(self).__name__} does not define embed(inputs, timesteps) -> (n, D)")

    def head(self, x: Tensor) -> Tensor:
        """``(n, D)`` to ``(n, C)``."""
        raise TypeError(f"{type(self).__name__} does not define head(x) -> (n, C)")

    def layered(self, embedded: Tensor) -> Sequence[Tensor]:
        """What :meth:`embed` gives, ``(n, D)`` each: what enters, then what is added after one layer, after two, ..."""
        return (embedded,)

    def predict(self, x: Tensor, given: Any) -> Tensor:
        """``(n, D)`` to ``(n, C)``, for the features ``given`` that entered at those rows; by default :meth:`head`."""
        return self.head(x)

    def meet(self, modalities: Mapping[str, Modality]) -> None:
        """Is shown all continuous modalities of the model once, and may use parts of them."""

    def shapes_of(self, given: Any) -> Tensor | None:
        """Rows along time, height and width of each span of the features ``given``, ``(S, 3)``; None where unknown."""
        return None

    def repeated(self, given: Any, counts: Sequence[int], times: int) -> Any:
        """Features of a batch each of whose sequences stands there ``times`` in a row; None where unknown.

        Args:
            given: the features.
            counts: how many positions of the modality each sequence has.
            times: how often a sequence is repeated.
        """
        return None

    def rows_of(self, given: Any) -> Tensor:
        """Targets in the form of the features to ``(n, C)``."""
        return given

    def noise_of_rows(self, given: Any, timesteps: Tensor | None) -> Tensor | None:
        """The time of each row of the features ``given``, ``(n,)``; None where none was given."""
        return timesteps

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``(n, C)`` twice to ``(n,)``: by default the mean squared error of each row."""
        return (outputs.float() - targets.float()).square().mean(-1)
