"""What a peer needs beyond its operands: the most memory at once, and what lies there waiting for backward.

On CUDA PyTorch counts. On a CPU nobody does: ``tracemalloc`` sees no tensor, PyTorch's profiler none of a library's own
memory. So there a process of its own runs the work twice, and the kernel tells by how much its resident memory rose at
most in the second run (``VmHWM`` in ``/proc/self/status``, set back through ``/proc/self/clear_refs`` just before).
Linux only, and true to about a mebibyte. Memory that our kernels would keep between the runs they give back there, so
that it counts.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimoe.bench.measure import work
from omnimoe.bench.peers import Peer, peers_for
from omnimoe.bench.problem import Problem, draw

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def saved_bytes(problem: Problem, peer: Peer) -> int:
    """Bytes that the forward pass keeps for backward, besides weights: every storage once, as long as it is."""
    given = [part.detach().requires_grad_() for part in problem.operands]
    banks = {part.untyped_storage().data_ptr() for part in given if part.ndim == 3}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in banks:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address that is free again would be counted for another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        peer.calls[problem.op](problem, *given)
    return sum(kept.values())


def peak_bytes(problem: Problem, peer: Peer, kind: str) -> int:
    """The most memory at once beyond the operands, results included; on CUDA, in this process."""
    job = work(problem, peer.calls[problem.op], kind)
    job()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Meter:
    """Measures on a CPU, in a new process each time, forked from one that has only imported what is needed.

    Args:
        threads: of PyTorch in those processes.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._context = multiprocessing.get_context("forkserver") if _STATUS.exists() else None
        if self._context is not None:
            self._context.set_forkserver_preload([__name__, "transformers.integrations.moe"])

    def peak_bytes(self, peer: str, kind: str, **drawn: Any) -> int | None:
        """The most memory at once beyond the operands, results included.

        Args:
            peer: its name; ``omnimoe/NAME`` for a backend.
            kind: of work.
            drawn: what :func:`~omnimoe.bench.problem.draw` takes.

        Returns:
            Bytes; None where the kernel does not tell.

        Raises:
            RuntimeError: if the process fails.
        """
        if self._context is None:
            return None
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_measure, args=(theirs, self.threads, peer, kind, drawn))
        process.start()
        theirs.close()
        try:
            found = ours.recv()
        except EOFError as error:
            process.join()
            raise RuntimeError(f"measuring the memory of {peer} ended with exit code {process.exitcode}") from error
        process.join()
        return found


def _measure(out: Connection, threads: int, name: str, kind: str, drawn: dict[str, Any]) -> None:
    os.environ["OMNIMOE_KEEP_MEMORY"] = "0"  # read when the kernels are first used
    torch.set_num_threads(threads)
    op, _, backend = drawn["op"], *name.partition("/")[1:]
    peer = peers_for(op, backends=[backend])[-1] if backend else next(one for one in peers_for(op) if one.name == name)
    problem = draw(**drawn)
    _run(problem, peer, kind)  # what libraries set up on first use does not count
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        out.send(None)
        return
    before = _status("VmRSS")
    results = _run(problem, peer, kind)
    out.send(max(0, _status("VmHWM") - before))
    del results


def _run(problem: Problem, peer: Peer, kind: str) -> list[Tensor]:
    return work(problem, peer.calls[problem.op], kind)()


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {name}")
    return int(found[1]) * 1024
