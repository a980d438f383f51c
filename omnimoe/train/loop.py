"""The training loop: packed batches, AdamW, evaluation, checkpoints. A resumed run is bitwise the unbroken one."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from omnimoe.auxiliary import hold_all_but_auxiliary
from omnimoe.data import Corpus
from omnimoe.freeze import freeze
from omnimoe.model import OmniMoeForCausalLM
from omnimoe.routing_trace import record_routing
from omnimoe.train.checkpoint import ResumeError, load_checkpoint, load_state, save_checkpoint
from omnimoe.train.data import Batch, held_out_batches, training_batches
from omnimoe.train.evaluation import evaluate, foretold, has_causal_twin, set_thresholds
from omnimoe.train.log import RunLog
from omnimoe.train.memory import explain_out_of_memory
from omnimoe.train.optim import make_optimizer
from omnimoe.train.processes import Processes
from omnimoe.train.settings import TrainSettings
from omnimoe.train.step import Stepper

logger = logging.getLogger(__name__)


REPORTING = frozenset(
    {"log_every", "log_routing", "save_every", "evaluate_every", "evaluate_batches", "keep", "router_nan"}
)
"""Settings that a resumed run may change: they decide what is told of it and not what is learned."""


@dataclass(kw_only=True)
class History:
    """What a run measured.

    Args:
        steps: the steps at which the model was evaluated; step 0 is before training.
        held_out: held-out loss by modality at those steps, in nats a token.
        causal: the same with each token routed by itself, where ``evaluate_causally`` asks for it and it is another.
        train_steps: the steps of the training log.
        train: training loss by modality there, mean since the entry before.
        seconds: time spent in training steps, evaluation not counted.
        tokens: tokens trained on.
    """

    steps: list[int] = field(default_factory=list)
    held_out: dict[str, list[float]] = field(default_factory=dict)
    causal: dict[str, list[float]] = field(default_factory=dict)
    train_steps: list[int] = field(default_factory=list)
    train: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


ROUTING = ("balance", "busiest", "experts_per_token", "dropped_share", "null_share", "mutual_information")
"""What is logged of a trace of routing, as means over layers; of a run in several processes, the rows of the first."""


class Training:
    """A run.

    Args:
        model: what is trained, on the device where it is.
        settings: how.
        corpus: on what; loaded by ``settings.data`` where None.
        out: folder for checkpoints and the log; None keeps nothing.
        name: shown beside the progress bar.
        show_progress: draw a bar on a terminal.

    Example:
        >>> from omnimoe import load
        >>> from omnimoe.train import Training, TrainSettings
        >>> settings = TrainSettings(steps=1, batch_size=1, sequence_length=128, evaluate_batches=1)
        >>> history = Training(load("dense_nano", seed=0), settings).run()
        >>> history.steps
        [0, 1]
    """

    def __init__(
        self,
        model: OmniMoeForCausalLM,
        settings: TrainSettings,
        *,
        corpus: Corpus | None = None,
        out: Path | str | None = None,
        name: str = "",
        show_progress: bool = True,
    ) -> None:
        self.model, self.settings, self.name, self.show_progress = model, settings, name, show_progress
        self.out = None if out is None else Path(out)
        self.corpus = Corpus.load(settings.data) if corpus is None else corpus
        self.device = next(model.parameters()).device
        self.batches = training_batches(model.config, settings, self.corpus)
        self.held_out = held_out_batches(model.config, settings, self.corpus)
        if settings.frozen:
            freeze(model, settings.frozen)
        if settings.stage == "auxiliary":
            hold_all_but_auxiliary(model, with_bias=settings.auxiliary_threshold != "half_unbiased")
        self.optimizer = make_optimizer(model, settings)
        self.processes = Processes.current()
        self.processes.check(settings.batch_size)
        self.step = 0
        self.history = History()
        self._stop_requested = self._stop_agreed = False
        self._follows: dict[str, Any] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        if settings.checkpoint_activations:
            # transformers' name for it changed on the way to version 6
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._stepper = Stepper(model, self.optimizer, settings, self.processes)

    @property
    def checkpoint_folder(self) -> Path | None:
        """Where the run's checkpoint is."""
        return None if self.out is None else self.out / "checkpoint"

    def resume(self) -> None:
        """Takes up the run where its newest checkpoint left it; one that is damaged is passed by, with a warning.

        Raises:
            ResumeError: if there is no checkpoint, all are damaged, or it is of another model or of a run with other
                settings.
        """
        folder = self.checkpoint_folder
        if folder is None:
            raise ResumeError("a run without a folder keeps no checkpoint to resume; give it out=")
        saved, state = load_checkpoint(folder)
        # read again, so that settings from before a field was there have its default
        was, now = TrainSettings.from_dict(state["settings"]).to_dict(), self.settings.to_dict()
        changed = [key for key in now if key not in REPORTING and was.get(key) != now[key]]
        if changed:
            told = ", ".join(f"{key} was {was.get(key)!r} and is {now[key]!r}" for key in changed)
            raise ResumeError(f"{folder} is of a run with other settings: {told}; give the same ones, or another out=")
        if saved.config.declaration() != self.model.config.declaration():
            raise ResumeError(
                f"{folder} holds a model that is declared otherwise; resume with that one, or another out="
            )
        self.model.load_state_dict(saved.state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["data"])
        self.step = state["step"]
        self.history = History(**state["history"])
        self._sums, self._counts = state["running"]
        self._resume_random(state["rng"])

    def follow(self, checkpoint: Path | str) -> None:
        """Takes up the data where another run's checkpoint left them; optimizer, schedule and steps start anew.

        For a model that was started from that checkpoint: what the seed has seen is not shown again before the rest.

        Args:
            checkpoint: its folder.

        Raises:
            ResumeError: if it has no state of a run.
            SequenceError: if that run read other data, or read them otherwise.
        """
        state = load_state(Path(checkpoint))
        self.batches.load_state_dict(state["data"])
        place = {"epoch": round(self.batches.epoch, 6), "tokens": state["history"]["tokens"], "step": state["step"]}
        self._follows = {"checkpoint": str(checkpoint), **place}

    @property
    def step_of_seed(self) -> int:
        """The step of the run whose data this one goes on with; 0 where it follows none."""
        return self._follows.get("step", 0)

    def _resume_random(self, states: list[dict[str, Any]]) -> None:
        rank, world_size = self.processes.rank, self.processes.world_size
        if len(states) != world_size:
            # there is no going on where another number of processes was: each draws anew, and differently at each step
            torch.manual_seed(self.settings.seed + (self.step + 1) * world_size + rank)
            logger.warning(
                "the checkpoint is of %d processes and goes on with %d: the order of data is the same, what parts draw "
                "is not",
                len(states),
                world_size,
            )
            return
        torch.set_rng_state(states[rank]["cpu"])
        if torch.cuda.is_available() and states[rank]["cuda"]:
            torch.cuda.set_rng_state_all(states[rank]["cuda"])

    def save(self) -> None:
        """Writes the checkpoint, if the run has a folder."""
        if self.checkpoint_folder is None:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "data": self.batches.state_dict(),
            "step": self.step,
            "settings": self.settings.to_dict(),
            "history": self.history.to_dict(),
            "running": (self._sums, self._counts),
        }
        with self.processes.held_together(f"at the checkpoint of step {self.step}"):
            state["rng"] = self.processes.gather(_random_state())
            if self.processes.is_first:
                save_checkpoint(self.checkpoint_folder, self.model, self.settings, state)
            self.processes.wait()

    def run(self, *, until: int | None = None, on_step: Callable[[Training], None] | None = None) -> History:
        """Trains to the end. Ctrl-C or SIGTERM ends the step, saves and returns; a second Ctrl-C breaks off at once.

        A fresh run seeds PyTorch's global generators, for parts that draw in their forward.

        Args:
            until: stop after this step instead, saving; the schedule stays that of ``settings.steps``.
            on_step: called after every step.

        Returns:
            What was measured.

        Raises:
            RouterError: if a router's answer is not finite and the settings' ``router_nan`` says to raise.
            OutOfMemoryError: if there is too little memory for a step; the message says what it needs and what helps.
            TrainingError: if the loss or its gradient is not finite; the message names the step and the modality. In
                all three cases weights and place in the data are those before the step, no gradients are left, and the
                last checkpoint stays as it was.
        """
        settings = self.settings
        last = settings.steps if until is None else min(until, settings.steps)
        is_first = self.processes.is_first
        log = RunLog(self.out if is_first else None, resume_from=self.step if self.history.steps or self.step else None)
        bar = tqdm(
            total=settings.steps,
            initial=self.step,
            desc=self.name or "train",
            unit="step",
            dynamic_ncols=True,
            disable=None if self.show_progress and is_first else True,
        )
        # what is to be foretold is the choice without the noise of training
        self.model.train(settings.stage == "whole")
        if self.step == 0:
            torch.manual_seed(settings.seed + self.processes.rank)
        with closing(log), self._interruptible(), bar:
            if self.step == 0 and self._follows:
                log.write(0, "follows", self._follows)
            if self.step == 0 and self.held_out and not self.history.steps:
                self._evaluate(log)
            while self.step < last and not self._is_over:
                started = time.perf_counter()
                values = self._take_step()
                self.step += 1
                self.history.seconds += time.perf_counter() - started
                self.history.tokens += settings.tokens_per_step
                values["tokens_per_second"] = self.history.tokens / self.history.seconds
                bar.update()
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tok/s")
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    self._log_training(log, values)
                ends = self.step == settings.steps
                if ends and settings.stage == "auxiliary" and settings.auxiliary_threshold == "set":
                    self._set_thresholds()
                if self.held_out and (ends or (settings.evaluate_every and self.step % settings.evaluate_every == 0)):
                    self._evaluate(log)
                if settings.save_every and self.step % settings.save_every == 0 and not ends:
                    self.save()
                if on_step is not None:
                    on_step(self)
        if self._stop_requested and is_first:
            logger.warning("stopped at step %d of %d; run again with resume to go on", self.step, settings.steps)
        self.save()
        return self.history

    @property
    def _is_over(self) -> bool:
        # a process that left the loop before the others know would have them wait for it
        return self._stop_requested if self.processes.world_size == 1 else self._stop_agreed

    @property
    def was_interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM ended the run."""
        return self._stop_requested

    def _take_step(self) -> dict[str, float]:
        place = self.batches.state_dict()
        told, stop = f"at step {self.step + 1}", self._stop_requested or self.processes.is_orphan
        try:
            with (
                self.processes.held_together(told),
                explain_out_of_memory(self.model, self.settings, self._own_batch, where=told),
            ):
                taken = self._stepper.take(self.batches, self.step, stop=stop)
        except Exception:
            # the step was not taken, so its batches are still to come
            self.batches.load_state_dict(place)
            raise
        self._stop_agreed = taken.is_last
        self._stop_requested |= taken.is_last
        for name, count in taken.counts.items():
            self._sums[name] = self._sums.get(name, 0.0) + taken.sums[name]
            self._counts[name] = self._counts.get(name, 0.0) + count
        return taken.numbers()

    def _own_batch(self) -> Batch:
        place = self.batches.state_dict()
        batch = self.processes.share(next(self.batches))
        self.batches.load_state_dict(place)
        return batch

    def _set_thresholds(self) -> None:
        place = self.batches.state_dict()
        set_thresholds(self.model, self.batches, self.processes, precision=self.settings.precision)
        self.batches.load_state_dict(place)

    def _log_training(self, log: RunLog, values: dict[str, float]) -> None:
        means = {name: self._sums[name] / self._counts[name] for name in self._sums if self._counts[name]}
        self._sums, self._counts = {}, {}
        self.history.train_steps.append(self.step)
        for name, mean in means.items():
            self.history.train.setdefault(name, []).append(mean)
        log.write(self.step, "train", {**values, **means})

    def _evaluate(self, log: RunLog) -> None:
        recorded = record_routing(self.model) if self.settings.log_routing else nullcontext()
        where = f"in the evaluation after step {self.step}"
        with explain_out_of_memory(self.model, self.settings, self._own_batch, where=where):
            with recorded as trace:
                losses = self._held_out_losses()
            asked = self.settings.evaluate_causally or self.settings.stage == "auxiliary"
            twin = asked and has_causal_twin(self.model.config)
            causal = self._held_out_losses(is_causal=True) if twin else {}
        self.history.steps.append(self.step)
        for held, found in ((self.history.held_out, losses), (self.history.causal, causal)):
            for name, loss in found.items():
                held.setdefault(name, []).append(loss)
        log.write(self.step, "held_out", losses)
        if causal:
            log.write(self.step, "held_out_causal", causal)
        if self.settings.stage == "auxiliary":
            batches = map(self.processes.share, self.held_out)
            log.write(self.step, "auxiliary", foretold(self.model, batches, precision=self.settings.precision))
        if trace is not None and trace.layers():
            log.write(self.step, "routing", {name: trace.mean(name) for name in ROUTING})
            log.picture(self.step, "routing/load", trace.heatmap(title=f"step {self.step}"))
        logger.info("step %d, held-out loss %s", self.step, ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))

    def _held_out_losses(self, *, is_causal: bool = False) -> dict[str, float]:
        return evaluate(
            self.model,
            self.held_out,
            precision=self.settings.precision,
            device=self.device,
            processes=self.processes,
            is_causal=is_causal,
        )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks the loop to stop after the step; a second Ctrl-C breaks off at once."""

        def ask(number: int, frame: Any) -> None:
            # a launcher passes on to its processes what the terminal has sent them already
            if number == signal.SIGINT and self.processes.world_size == 1:
                signal.signal(number, before[signal.SIGINT])
            self._stop_requested = True

        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:  # outside the main thread signals are not ours to handle
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
