"""``omnimoe train`` as torchrun starts it, where one process can be made to die, or to stand still.

Its arguments are those of the command; what happens to which process comes in the environment as JSON:
``{"rank": 1, "step": 5, "signal": "SIGKILL", "during": "step"}``, or ``"save"`` for the checkpoint after that step. A
process that was started anew lives.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from omnimoe.cli import main
from omnimoe.train import Training
from omnimoe.train.processes import Processes

FATE = json.loads(os.environ.get("FATE", "{}"))
RANK = int(os.environ.get("RANK", "0"))


def strike(*_args: object) -> None:
    os.kill(os.getpid(), getattr(signal, FATE["signal"]))


def arm(run: Training) -> None:
    """Called after every step."""
    if run.step != FATE["step"]:
        return
    if FATE["during"] == "step":
        strike()
        return
    if RANK:
        # the first process is writing, the others wait for it
        Processes.wait = strike
        return
    replace, left = Path.replace, [2]

    def replace_some(path: Path, target: Path) -> Path:
        left[0] -= 1
        if not left[0]:
            strike()
        return replace(path, target)

    Path.replace = replace_some


if __name__ == "__main__":
    if "PIDS" in os.environ:
        (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    if FATE and FATE["rank"] == RANK and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        plain = Training.run
        Training.run = lambda run, **given: plain(run, on_step=arm, **given)
    sys.exit(main(sys.argv[1:]))
