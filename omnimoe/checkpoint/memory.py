"""How much memory there is, and whether a model fits into it; asked before any is taken."""

from __future__ import annotations

import re
from pathlib import Path

from omnimoe.checkpoint.errors import CheckpointError


def check_memory(needed: int, what: str) -> None:
    """Refuses a model that is larger than the memory that is free.

    Args:
        needed: bytes of its weights.
        what: what describes it, for the message.

    Raises:
        CheckpointError: if it does not fit; where nobody knows how much is free, never.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise CheckpointError(
            f"{what} asks for {in_units(needed)} of weights ({needed:,} bytes), and {in_units(free)} of memory are "
            "free; if that is right, load it in a narrower dtype, spread it by device_map, or pass check_size=False"
        )


def available_memory() -> int | None:
    """Bytes that this process can still take: of the machine with its swap, its container, its own limit."""
    found = [_of_machine(), _of_container(), _of_process()]
    known = [value for value in found if value is not None]
    return max(0, min(known)) if known else None


def in_units(count: int) -> str:
    """Bytes for people.

    Example:
        >>> in_units(1536), in_units(4 * 10**12)
        ('1.54 kB', '4 TB')
    """
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB", "EB"):
        if value < 1000 or unit == "EB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def _of_machine() -> int | None:
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo")))
    return 1024 * (int(fields["MemAvailable"]) + int(fields.get("SwapFree", 0))) if "MemAvailable" in fields else None


def _of_container() -> int | None:
    """Of the control group, version 2 and 1; what it keeps of files can be taken back."""
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, now = _read(f"{folder}/{limit}").strip(), _read(f"{folder}/{used}").strip()
        if most.isdigit() and now.isdigit():
            kept = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(f"{folder}/memory.stat"), re.MULTILINE)
            return int(most) - int(now) + (int(kept[1]) if kept else 0)
    return None


def _of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = re.search(r"VmSize:\s+(\d+) kB", _read("/proc/self/status"))
    return None if most == resource.RLIM_INFINITY or used is None else most - 1024 * int(used[1])


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # another system, or none of our business
        return ""
