"""The record of a run: one JSON line an event, and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RunLog:
    """Writes ``log.jsonl`` and TensorBoard's event files into a folder; into nothing where the folder is None.

    Args:
        folder: the run's folder, or None.
        resume_from: drop lines of this step and later ones, which an interrupted run had written already.
    """

    def __init__(self, folder: Path | None, *, resume_from: int | None = None) -> None:
        self._file = self._board = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = []
        if resume_from is not None and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= resume_from]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Records numbers of a step under ``kind``, such as ``"train"``."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
