"""What goes wrong in a child is told in the test that started it, and nothing of it reaches this process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time

import pytest
import torch

from tests.children import ChildError, capped, in_child, limited


def test_what_it_returns_comes_back():
    assert in_child(lambda: {"a": [1, None]}) == {"a": [1, None]}


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (lambda: bytearray(1 << 30), "it asked for more than the 64 MB it may take"),
        (lambda: torch.ones(1 << 28).sum().item(), "allocate"),
        (lambda: [0] * (1 << 27), "it asked for more than the 64 MB it may take"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: pytest.fail("not so"), "not so"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "it was ended by SIGKILL within 240 seconds, with 64 MB"),
    ],
    ids=["bytes", "a tensor", "a list", "an error", "an assertion", "a crash"],
)
def test_a_child_that_fails_fails_alone_and_is_told(action, told):
    with pytest.raises(ChildError) as caught:
        in_child(action, memory=64 << 20)
    assert told in str(caught.value)
    assert caught.value.signal in (None, signal.SIGKILL)


def test_a_child_that_waits_is_ended():
    begun = time.monotonic()
    with pytest.raises(ChildError, match="it took more than 1 seconds"):
        in_child(lambda: time.sleep(60), seconds=1)
    assert time.monotonic() - begun < 30


HERE = os.getpid()


@pytest.mark.parametrize("number", [1, 2])
@capped(64 << 20)
def test_a_capped_test_runs_in_a_child_with_its_fixtures(number, tmp_path):
    assert os.getpid() != HERE
    (tmp_path / str(number)).write_text("")
    with pytest.raises(MemoryError):
        bytearray(1 << 30)


def test_a_capped_test_that_takes_too_much_fails_in_those_words():
    @capped(64 << 20)
    def bomb(size: int) -> None:
        bytearray(size)

    bomb(size=1)
    with pytest.raises(ChildError, match="it asked for more than the 64 MB it may take"):
        bomb(size=1 << 30)


def test_a_limit_of_this_process_holds_in_the_block_and_for_what_is_started_there():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with limited(64 << 20):
        given = resource.getrlimit(resource.RLIMIT_AS)[0]
        told = subprocess.run(["sh", "-c", "ulimit -v"], capture_output=True, text=True, check=True).stdout
        with pytest.raises(MemoryError):
            bytearray(1 << 30)
    assert int(told) == given >> 10
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(ZeroDivisionError), limited(64 << 20):
        1 / 0  # noqa: B018
    assert resource.getrlimit(resource.RLIMIT_AS) == before
