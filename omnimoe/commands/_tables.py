"""Numbers and tables as people read them."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table


def console() -> Console:
    """Where tables go: as wide as the terminal, or 120 columns into a file."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def count(number: float) -> str:
    """A large number with a unit: ``37.0M``, ``1.50B``.

    Example:
        >>> count(37_012_345), count(1_501_700_000), count(640)
        ('37.0M', '1.50B', '640')
    """
    for size, unit, digits in ((1e12, "T", 2), (1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if abs(number) >= size:
            return f"{number / size:.{digits}f}{unit}"
    return f"{number:.0f}"


def known(number: float | None) -> str:
    """A count, or ``unknown`` where a part of the model does not state it."""
    return "unknown" if number is None else count(number)


def spread(measured: dict[str, Any] | None, *, percent: bool = False) -> str:
    """A mean with half its 95 % interval over seeds; a dash where nothing was measured."""
    if measured is None:
        return "–"
    scale, digits, unit = (100, 0, " %") if percent else (1, 3, "")
    mean = f"{measured['mean'] * scale:.{digits}f}"
    half = measured["half"]
    return mean + ("" if half is None else f" ± {half * scale:.{digits}f}") + unit


def comparison_table(rows: list[dict[str, Any]], modalities: list[str]) -> Group:
    """A comparison as two tables: sizes, FLOPs and time; then loss and share of the baseline's steps by modality.

    A model that looks ahead has a line for that and one for its causal form, and the lines say which is which.
    """
    names = ["all tokens" if modality == "all" else modality for modality in modalities]
    scored = {row["model"] for row in rows if row["scored"] != "causal"}
    forms = ["scored"] if scored else []
    costs = plain_table("model", "params", "active", "FLOPs/token", "time")
    losses = plain_table("model", *forms, *(f"loss\n{name}" for name in names), *(f"steps\n{name}" for name in names))
    told: set[str] = set()
    for row in rows:
        if row["model"] not in told:
            told.add(row["model"])
            ratio, time = row["flops_ratio"], row["time_ratio"]
            costs.add_row(
                row["model"],
                count(row["total_params"]),
                known(row["active_params"]),
                known(row["flops_per_token"]) + ("" if ratio is None else f" ({ratio:.2f}x)"),
                f"{row['seconds']:.0f} s" + ("" if time is None else f" ({time:.2f}x)"),
            )
        shares = [
            "100 %" if row["model"] == row["baseline"] else spread(row["share"][modality], percent=True)
            for modality in modalities
        ]
        form = [row["scored"]] if scored else []
        losses.add_row(row["model"], *form, *(spread(row["loss"][modality]) for modality in modalities), *shares)
    return Group(costs, "", losses)


def plain_table(first: str, *others: str) -> Table:
    """An empty table: the first column to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
