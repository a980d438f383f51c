"""Tests in copies of their process that may take so much memory and time: what is destructive ends there."""

from __future__ import annotations

import functools
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class ChildError(Exception):
    """A child that raised, was killed, or took too much."""

    def __init__(self, answer: str, number: int = 0) -> None:
        super().__init__(answer)
        self.signal = signal.Signals(number) if number > 0 else None


def in_child(action: Callable[[], Any], *, memory: int = 2 << 30, seconds: int = 240) -> Any:
    """Runs something destructive in a copy of this process.

    Args:
        action: what is run.
        memory: bytes of address space that it may take beyond what this process has. A program that it starts is held
            to the same sum, and so may take what this process has and these bytes.
        seconds: after which it is ended.

    Returns:
        What it returned, as JSON has it.

    Raises:
        ChildError: with its traceback; ``signal`` names what killed it.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    back, to = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        status = 1
        try:
            os.close(back)
            status, answer = _capped(action, memory, seconds)
            os.write(to, answer.encode()[:60_000])
        finally:
            os._exit(status)
    os.close(to)
    with os.fdopen(back, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    number = -os.waitstatus_to_exitcode(status)
    if number > 0:
        ended = "took more than" if number == signal.SIGALRM else f"was ended by {signal.Signals(number).name} within"
        raise ChildError(f"it {ended} {seconds} seconds, with {memory >> 20} MB to take", number)
    if status:
        raise ChildError(answer)
    return json.loads(answer)


def _capped(action: Callable[[], Any], memory: int, seconds: int) -> tuple[int, str]:  # pragma: no cover
    """What an action comes to under limits of this process: a status, and its answer or what went wrong."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    try:
        with limited(memory):
            answer = action()
        return 0, json.dumps(answer)
    except BaseException as error:
        is_greedy = isinstance(error, MemoryError)
        return 1, f"it asked for more than the {memory >> 20} MB it may take\n" * is_greedy + traceback.format_exc()


@contextmanager
def limited(memory: int) -> Iterator[None]:
    """This process itself may take so many bytes within the block, for what no copy of a process can do.

    A program that it starts there may take what this process has and these bytes, and so may each that it starts.
    """
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def capped(memory: int, *, seconds: int = 240) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test in a child of its own, which may take so many bytes and seconds; each of its cases in another one."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **given: Any) -> None:
            in_child(functools.partial(test, *args, **given), memory=memory, seconds=seconds)

        return run

    return decorate
