"""Ranks as processes of this machine: gloo on the CPU, nccl where each rank has a device of its own."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(seconds=120)
"""A rank that waits longer than this for another one gives up, so that a failure is seen and not a hang."""


def _get_distributed_device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _get_distributed_backend() -> str:
    return "nccl" if _get_distributed_device_type() == "cuda" else "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device(_get_distributed_device_type(), rank) if torch.cuda.is_available() else torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    if _get_distributed_device_type() == "cuda":
        torch.cuda.set_device(rank)


def _start_rank_processes(fn: Callable, args: tuple, nprocs: int) -> None:
    """``fn(rank, *args)`` in that many new processes; an exception in one is raised here."""
    mp.start_processes(_rank, args=(fn, args), nprocs=nprocs, start_method="spawn")


def _rank(rank: int, fn: Callable, args: tuple) -> None:
    # ranks share the cores, and the suite's own limits assume that each has one
    torch.set_num_threads(1)
    fn(rank, *args)


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """Decorator: the function runs as ``fn(rank, *args)`` in ``world_size`` processes that form a group."""

    def wrap(fn: Callable) -> Callable:
        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> None:
            server = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(_in_group, (fn, args, kwargs, world_size, server.port), world_size)

        return run

    return wrap


def _know_banks() -> None:
    """Lets the suite find a rank's part of a gradient where gate and up, in one matrix, are both split.

    It knows such a matrix by the name of transformers' own style, ``packed_colwise``; banks have ``bank_mlp``.
    """
    from . import test_tensor_parallel_mixin as suite

    known = suite._reference_grad_shard

    def reference_grad_shard(name: str, grad: torch.Tensor, local: torch.Tensor, rank: int, size: int, *rest: Any):
        if name.endswith(".experts.gate_up_proj") and local.size(1) < grad.size(1):
            return suite.get_packed_grad_shard(grad, size, rank, 1)
        return known(name, grad, local, rank, size, *rest)

    suite._reference_grad_shard = reference_grad_shard


def _in_group(rank: int, fn: Callable, args: tuple, kwargs: dict, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    _set_rank_device(rank)
    _know_banks()
    store = dist.TCPStore("localhost", port, world_size=None, is_master=False)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    try:
        fn(rank, *args, **kwargs)
    except Exception:
        # the others wait at a barrier; the parent hears of the first one that ends
        traceback.print_exc()
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()
