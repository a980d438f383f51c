"""Starts two processes that form a group over gloo, and reads how each case ended on each of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).parent / "cases.py"
TIME = 280


def run(folder: Path, names: list[str], *, world_size: int = 2) -> dict[str, list[str]]:
    """Runs cases, one after another, in one group of processes.

    Args:
        folder: where they may write.
        names: of cases.
        world_size: number of processes.

    Returns:
        What each rank says of each case: nothing where it held, else a traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = "1"
    ranks = []
    for rank in range(world_size):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(CASES), str(folder), *names]
        with Path(folder, f"rank{rank}.log").open("w", encoding="utf-8") as log:
            ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in ranks:
            process.wait(timeout=TIME)
    except subprocess.TimeoutExpired:
        pass  # told below: a case without an answer did not end
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    said = []
    for rank in range(world_size):
        path = Path(folder, f"rank{rank}.json")
        log_text = Path(folder, f"rank{rank}.log").read_text(encoding="utf-8")[-2000:]
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        said.append({name: held.get(name, f"rank {rank} did not end this case:\n{log_text}") for name in names})
    return {name: [held[name] for held in said] for name in names}
