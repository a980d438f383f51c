"""The processes of a run: those that torchrun started, or this one alone.

Every process holds the whole model and takes its own rows of each batch, so that a run is the same run on one process
and on several, up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from omnimoe.config import ConfigError
from omnimoe.train.data import Batch
from omnimoe.train.errors import TrainingError

T = TypeVar("T")

LAUNCHED = frozenset({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
"""Variables by which a launcher tells a process of the others."""


@contextmanager
def joined(device: torch.device | str = "cpu", *, timeout: float = 600.0) -> Iterator[torch.device]:
    """Joins the other processes of a run that ``torchrun`` or its like started; without it there is nothing to join.

    Args:
        device: where to train; ``"cuda"`` becomes the process's own one.
        timeout: seconds that a process waits for the others before it gives up.

    Yields:
        The device of this process.

    Example:
        >>> with joined("cpu") as device:
        ...     device
        device(type='cpu')
    """
    device = torch.device(device)
    if dist.is_initialized() or not LAUNCHED.issubset(os.environ):
        yield device
        return
    if device.type == "cuda" and device.index is None:
        number = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count()
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    backend, wait = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout)
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=wait)))
    # torchrun keeps its store over restarts, and with it the addresses of processes that are gone
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    yield device
    # not after an error: the others may never come, and the process ends anyway
    dist.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        rank: its number.
        world_size: how many there are.
        launcher: the process that started this one and looks after it; None where nobody does.
    """

    rank: int = 0
    world_size: int = 1
    launcher: int | None = None

    @classmethod
    def current(cls) -> Processes:
        """Those that were joined, or this one alone."""
        if not dist.is_initialized():
            return cls()
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        return cls(dist.get_rank(), dist.get_world_size(), launcher)

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher was killed, so that nobody would end this process where another is lost."""
        return self.launcher is not None and os.getppid() != self.launcher

    @property
    def is_first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    @contextmanager
    def held_together(self, where: str) -> Iterator[None]:
        """Says so where another process is gone or does not answer.

        Args:
            where: what was under way, for the message.

        Raises:
            TrainingError: which ends this process too, so that torchrun can end or restart them all.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo raises nothing more particular
            is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if self.world_size == 1 or not is_lost:
                raise
            told = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"process {self.rank} of {self.world_size} lost another {where}: it ended, or was silent for longer "
                f"than the timeout; its own output says why ({told})"
            ) from error

    def check(self, batch_size: int) -> None:
        """Refuses a batch that cannot be shared out evenly.

        Raises:
            ConfigError: with both numbers.
        """
        if batch_size % self.world_size:
            raise ConfigError(
                f"batch_size {batch_size} cannot be shared out among {self.world_size} processes; "
                f"make it a multiple of {self.world_size}"
            )

    def share(self, batch: Batch) -> Batch:
        """The rows of a batch that are this process's."""
        if self.world_size == 1:
            return batch
        rows = len(next(iter(batch.values()))) // self.world_size
        return {name: value[self.rank * rows : (self.rank + 1) * rows] for name, value in batch.items()}

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call in training: its gradients are averaged over the processes in backward."""
        return model if self.world_size == 1 else DistributedDataParallel(model)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in the place of ``values``."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    @torch.no_grad()
    def average(self, buffers: Iterable[Tensor]) -> None:
        """Makes each buffer the mean over the processes."""
        if self.world_size > 1:
            for buffer in buffers:
                self.sum(buffer).div_(self.world_size)

    def gather(self, value: T) -> list[T]:
        """What each process holds, in order of rank."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.world_size > 1:
            dist.barrier()
