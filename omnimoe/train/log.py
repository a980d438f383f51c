"""The record of a run: one JSON line an event, and TensorBoard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


class RunLog:
    """Writes ``log.jsonl`` and TensorBoard's event files into a folder; into nothing where the folder is None.

    Args:
        folder: the run's folder, or None.
        resume_from: the step that a run is taken up at: what an interrupted run wrote of later steps is dropped. None
            starts anew, dropping everything.
    """

    def __init__(self, folder: Path | None, *, resume_from: int | None = None) -> None:
        self._file = self._board = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept: list[str] = []
        if resume_from is None:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        elif path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _belongs(line, resume_from)]
        path.write_text("".join(kept))
        self._file = path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets the step it is told and all that follow
        purge = None if resume_from is None else resume_from + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Records numbers of a step under ``kind``, such as ``"train"``."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, step: int, name: str, figure: Any) -> None:
        """Shows a figure of matplotlib in TensorBoard."""
        if self._board is not None:
            self._board.add_figure(name, figure, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _belongs(line: str, resume_from: int) -> bool:
    # a killed run may leave its last line torn
    return line.endswith("\n") and json.loads(line)["step"] <= resume_from
