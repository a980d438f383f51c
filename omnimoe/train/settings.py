"""What a training run is, apart from the model: one frozen config that is saved beside every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omnimoe.config import Config, ConfigError

PRECISIONS = ("fp32", "bf16")
ROUTER_NAN = ("raise", "warn", "off")
STAGES = ("whole", "auxiliary")
THRESHOLDS = ("set", "half", "half_unbiased")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Config):
    """Settings of a run. Lengths are in tokens, times in optimizer steps."""

    data: str = "p"
    """A shipped corpus by name, or a folder."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences in a forward, of all processes together."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    accumulate: int = 1
    """Forwards in a step; each weighs the same, whatever it holds."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    final_learning_rate: float = 0.05
    """Share of the peak at the end of the cosine."""
    warmup: int = 50
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.95
    """AdamW's second decay."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices alone."""
    clip: float = 1.0
    """Largest norm of all gradients; 0 for no clipping."""
    precision: str = "bf16"
    """``"bf16"`` runs the forward under autocast, ``"fp32"`` does not; weights and optimizer are float32 in both."""
    checkpoint_activations: bool = False
    """Recompute each layer in backward instead of keeping its activations."""
    text_share: float = 0.3
    """Share of tokens that running text should have."""
    templates: str = ""
    """Mixture of templates that rows are told by, as in tell=0.8,alone=0.1,name_it=0.1; empty for tell alone. Held-out
    batches are told by tell."""
    noise: str = ""
    """Share of a modality's input tokens that are replaced by random ones of it in training, as in
    image=0.1,speech=0.25; labels stay. It keeps a model with few data from learning them by heart."""
    freeze: str = ""
    """Keys whose weights stay as they are, as in text or text,image; see :func:`omnimoe.freeze`."""
    stage: str = "whole"
    """``"whole"`` trains the model, ``"auxiliary"`` its auxiliary routers alone, which is MoMa's second stage."""
    auxiliary_threshold: str = "set"
    """Where that stage leaves thresholds: ``"set"`` at its end so that as many tokens are taken as the batch chose,
    ``"half"`` at one half, a trained bias inside, ``"half_unbiased"`` at one half without a bias, as MoMa has it."""
    seed: int = 0
    """Seed of weights and data order."""
    evaluate_every: int = 100
    """Steps between evaluations; 0 for the end alone."""
    evaluate_batches: int = 8
    """Held-out batches in an evaluation, as large as those of training; 0 for no evaluations."""
    evaluate_causally: bool = False
    """Where routers choose among rows, evaluate a second time with each token routed by itself, as generation does."""
    save_every: int = 0
    """Steps between checkpoints; 0 for the end alone."""
    keep: int = 2
    """Checkpoints to keep: the newest, and those before it in case it is damaged."""
    router_nan: str = "raise"
    """What to do when a router's answer is NaN or infinite: ``"raise"`` stops the run and names layer and modality,
    ``"warn"`` says it and goes on, ``"off"`` does not look."""
    log_every: int = 10
    """Steps between lines of the log."""
    log_routing: bool = False
    """Log at each evaluation what routers do, and for TensorBoard a picture of which experts each modality meets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("steps", "batch_size", "sequence_length", "accumulate", "log_every", "keep")
        self.check_not_negative(
            "warmup", "clip", "weight_decay", "evaluate_every", "save_every", "evaluate_batches", "seed"
        )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in 0..1 and below 1, got {getattr(self, name)}")
        for name in ("final_learning_rate", "text_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share and must lie in 0..1, got {getattr(self, name)}")
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and positive, got {getattr(self, name)}")
        _read_mixture(self.templates)
        for name, share in self.noise_shares.items():
            if share >= 1:
                raise ConfigError(f"noise is a share of tokens and must lie below 1, got {name}={share:g}")
        if self.stage == "auxiliary" and self.frozen:
            raise ConfigError(
                f"stage 'auxiliary' freezes all else by itself, got freeze={self.freeze!r} beside it; drop it"
            )
        for name, known in (
            ("precision", PRECISIONS),
            ("router_nan", ROUTER_NAN),
            ("stage", STAGES),
            ("auxiliary_threshold", THRESHOLDS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.auxiliary_threshold != "set" and self.stage != "auxiliary":
            raise ConfigError(
                f"auxiliary_threshold {self.auxiliary_threshold!r} is of stage 'auxiliary', got stage {self.stage!r}; "
                "drop it"
            )

    @property
    def mixture(self) -> dict[str, float] | None:
        """:attr:`templates` as template to weight; None where it is empty."""
        return _read_mixture(self.templates) or None

    @property
    def noise_shares(self) -> dict[str, float]:
        """:attr:`noise` as modality to share."""
        return _read_mixture(self.noise, "noise")

    @property
    def frozen(self) -> tuple[str, ...]:
        """:attr:`freeze` as names."""
        return tuple(filter(None, (name.strip() for name in self.freeze.split(","))))

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.batch_size * self.sequence_length * self.accumulate


def _read_mixture(given: str, field: str = "templates") -> dict[str, float]:
    found = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, _, weight = part.partition("=")
        try:
            found[name.strip()] = float(weight)
        except ValueError:
            raise ConfigError(f"{field} must read name=number,name=number, got {part!r} in {given!r}") from None
        if not 0 < found[name.strip()] < math.inf:
            raise ConfigError(f"numbers of {field} must be positive, got {part!r} in {given!r}")
    return found
