"""Pictures a person can read: loss curves, grids of pictures, bars, which copies the tokens of each modality meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from omnimoe.compare import Comparison

COLOURS = ("#3b6fb6", "#d1662a", "#2f8f5b", "#8a5fb0", "#b8963a", "#c2455e", "#5a7d8c", "#7a7a7a")
"""One a model or a modality, in order; told apart in print and by colour-blind readers."""


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 120, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_curves(comparison: Comparison, path: Path | str, *, groups: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Held-out loss of every model against steps, a panel for each modality.

    Where experts chose among later tokens, the line is dotted; that of the causal form is not.

    Args:
        comparison: what was measured.
        path: where the PNG goes.
        groups: title to models, each a row of panels of its own, for more models than one panel holds; None for one row
            of all.

    Returns:
        The path.
    """
    plt = _pyplot()
    modalities = comparison.modalities
    finished = [name for name in comparison.names if comparison.histories.get(name)]
    shown = {title: [name for name in names if name in finished] for title, names in (groups or {"": finished}).items()}
    shown = {title: names for title, names in shown.items() if names}
    figure, axes = plt.subplots(
        len(shown), len(modalities), figsize=(3.4 * len(modalities), 3.2 * len(shown)), squeeze=False
    )
    for line, (title, names) in zip(axes, shown.items(), strict=True):
        for axis, modality in zip(line, modalities, strict=True):
            _draw_losses(axis, comparison, names, modality)
            axis.set_title("all tokens" if modality == "all" else modality)
            axis.set_xlabel("steps")
            axis.grid(alpha=0.25)
        line[0].set_ylabel(f"{title}\n" * bool(title) + "held-out loss, nats a token")
        if groups is None:
            line[-1].legend(frameon=False)
        else:
            line[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def _draw_losses(axis: Axes, comparison: Comparison, names: Sequence[str], modality: str) -> None:
    """A line a model and form, a band from the lowest seed to the highest, and limits that leave out the first fall."""
    seen = []
    for colour, name in zip(COLOURS * 3, names, strict=False):
        runs = comparison.histories[name]
        steps = next(iter(runs.values())).steps
        for form in comparison.forms(name):
            losses = np.array([comparison.losses(name, seed, form)[modality] for seed in runs])
            is_ahead = form != "causal"
            label = f"{name}, looks ahead" if is_ahead else name
            axis.plot(steps, losses.mean(0), ":" if is_ahead else "-", color=colour, label=label, linewidth=1.6)
            if len(runs) > 1:
                axis.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
            seen.append(losses[:, len(steps) // 4 :].ravel())
    every = np.concatenate(seen)
    axis.set_ylim(every.min() - 0.05 * np.ptp(every), every.max() + 0.05 * np.ptp(every))


def draw_shares(
    rows: Sequence[Mapping[str, Any]], modalities: Sequence[str], path: Path | str, *, title: str = ""
) -> Path:
    """The share of the baseline's steps that each model needs, with its interval, a panel for each modality.

    Args:
        rows: as :meth:`omnimoe.compare.Comparison.rows` gives them.
        modalities: of the losses.
        path: where the PNG goes.
        title: above all panels.

    Returns:
        The path.
    """
    plt = _pyplot()
    shown = [row for row in rows if row["model"] != row["baseline"]]
    places = range(len(shown), 0, -1)
    figure, axes = plt.subplots(
        1, len(modalities), figsize=(2.3 * len(modalities) + 2.2, 0.23 * len(shown) + 1.3), squeeze=False, sharey=True
    )
    for axis, modality in zip(axes[0], modalities, strict=True):
        for place, row in zip(places, shown, strict=True):
            share = row["share"][modality]
            if share is None:
                continue
            is_ahead = row["scored"] != "causal"
            error = None if share["half"] is None else 100 * share["half"]
            fill = "white" if is_ahead else COLOURS[0]
            axis.errorbar(
                100 * share["mean"], place, xerr=error, fmt="o", color=COLOURS[0], markerfacecolor=fill, markersize=4
            )
        axis.axvline(100, color="#222222", linewidth=1)
        axis.set_title("all tokens" if modality == "all" else modality)
        axis.set_xlabel("% of the baseline's steps")
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    names = [row["model"] + (", looks ahead" if row["scored"] != "causal" else "") for row in shown]
    axes[0][0].set_yticks(places, names)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def draw_grid(
    rows: Sequence[Sequence[np.ndarray]],
    path: Path | str,
    *,
    captions: Sequence[str] = (),
    headings: Sequence[str] = (),
    scale: int = 2,
) -> Path:
    """Pictures in rows and columns, with a caption under each column and a heading left of each row.

    Args:
        rows: each a row of ``(H, W, 3)`` uint8 pictures of one size.
        path: where the PNG goes.
        captions: a text a column.
        headings: a text a row.
        scale: how many screen pixels a pixel takes.

    Returns:
        The path.
    """
    plt = _pyplot()
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    inch = scale / 100
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(columns * width * inch + 1.1 * bool(headings), len(rows) * height * inch + 0.55 * bool(captions)),
        squeeze=False,
    )
    for row, heading, line in zip(axes, list(headings) + [""] * len(rows), rows, strict=False):
        for axis, picture in zip(row, line, strict=False):
            axis.imshow(picture, interpolation="nearest")
        for axis in row:
            axis.set_axis_off()
        row[0].text(-0.08, 0.5, heading, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[-1], captions, strict=False):
        axis.text(0.5, -0.06, _wrap(caption), transform=axis.transAxes, ha="center", va="top", fontsize=7)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)
    return Path(path)


def draw_bars(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    labels: Sequence[str],
    path: Path | str,
    *,
    ylabel: str,
    mark: str = "",
    title: str = "",
) -> Path:
    """Groups of bars, a panel below the other: what each of several makes of each of several things.

    Args:
        panels: title to name to a height a label; None where there is none.
        labels: under the groups.
        path: where the PNG goes.
        ylabel: what the heights are.
        mark: the name that is drawn as a line across its group, a yardstick, rather than as a bar.
        title: above all panels.

    Returns:
        The path.
    """
    plt = _pyplot()
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel if name != mark))
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(max(6.0, 1.15 * len(labels) + 1.6), 2.5 * len(panels) + 0.5),
        squeeze=False,
        sharex=True,
    )
    width = 0.8 / max(1, len(names))
    for axis, (heading, panel) in zip(axes[:, 0], panels.items(), strict=True):
        for index, (colour, name) in enumerate(zip(COLOURS * 3, names, strict=False)):
            found = [(x, height) for x, height in enumerate(panel.get(name, ())) if height is not None]
            places = [x - 0.4 + (index + 0.5) * width for x, _ in found]
            axis.bar(places, [height for _, height in found], 0.92 * width, color=colour, label=name)
        found = [(x, height) for x, height in enumerate(panel.get(mark, ())) if height is not None]
        if found:
            low, high = [x - 0.45 for x, _ in found], [x + 0.45 for x, _ in found]
            axis.hlines([height for _, height in found], low, high, color="#222222", linewidth=1.2, label=mark)
        axis.set_title(heading, loc="left")
        axis.set_ylabel(ylabel)
        axis.grid(alpha=0.25, axis="y")
        axis.set_axisbelow(True)
        axis.margins(x=0.01)
    axes[-1][0].set_xticks(range(len(labels)), labels, rotation=20, ha="right", rotation_mode="anchor")
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    inch = 1 / figure.get_figheight()
    figure.text(0.01, 1 - 0.05 * inch, title, va="top")
    legend = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 0.2 * inch), "columnspacing": 1.2}
    figure.legend(handles.values(), handles, frameon=False, ncols=len(handles), **legend)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 * inch))
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def draw_routing(
    load: np.ndarray,
    modality_ids: np.ndarray,
    names: Sequence[str],
    path: Path | str,
    *,
    title: str = "",
) -> Path:
    """Which copies the tokens of each modality meet, and how one sequence alternates between modalities.

    Args:
        load: ``(L, M, E)``, the share of a modality's tokens that meets each copy of each layer.
        modality_ids: ``(T,)``, a sequence in order of time.
        names: modalities.
        path: where the PNG goes.
        title: of the picture.

    Returns:
        The path.
    """
    plt = _pyplot()
    from matplotlib.colors import ListedColormap

    num_layers, num_modalities, _ = load.shape
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.2, 1.6 + 0.34 * num_layers * num_modalities / 2), height_ratios=[1, 0.45 * num_layers + 1]
    )
    colours = ListedColormap(COLOURS[:num_modalities])
    top.imshow(
        modality_ids[None], aspect="auto", cmap=colours, vmin=-0.5, vmax=num_modalities - 0.5, interpolation="nearest"
    )
    top.set_yticks([])
    top.set_xlabel("position in a held-out sequence")
    top.set_title(title, loc="left")
    for index, name in enumerate(names):
        top.plot([], [], "s", color=COLOURS[index], label=name)
    top.legend(frameon=False, ncols=num_modalities, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    _heat(bottom, load, names)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def draw_load(
    load: np.ndarray,
    names: Sequence[str],
    path: Path | str | None = None,
    *,
    labels: Sequence[str] = (),
    title: str = "",
    free: Sequence[Sequence[str]] = (),
) -> Path | Figure:
    """Which experts of each layer are used, and by what.

    Args:
        load: ``(L, M, E)``, the share of the tokens of each of M that meets each expert of each layer.
        names: of the M.
        path: where the PNG goes; None for a figure.
        labels: of the L; ``layer 0`` and so on where empty.
        title: above it.
        free: for each layer, the kinds of the experts behind those of the bank; they are named in the ticks.

    Returns:
        The path, or the figure.
    """
    plt = _pyplot()
    num_layers, num_rows, num_experts = load.shape
    width = min(16.0, 2.2 + 0.42 * num_experts)
    figure, axis = plt.subplots(figsize=(max(4.2, width), 1.1 + 0.2 * num_layers * num_rows))
    _heat(axis, load, names, labels)
    axis.set_xlabel("expert, share of the tokens that meet it")
    kinds = max(free, key=len, default=())
    if kinds and all(len(found) in (0, len(kinds)) for found in free):
        first = num_experts - len(kinds)
        axis.set_xticks(range(num_experts), [*(str(i) for i in range(first)), *kinds], rotation=0, fontsize=7)
    axis.set_title(title, loc="left")
    figure.tight_layout()
    if path is None:
        plt.close(figure)  # the caller holds it; pyplot need not
        return figure
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return Path(path)


def _heat(axis: Axes, load: np.ndarray, names: Sequence[str], parts: Sequence[str] = ()) -> None:
    num_layers, num_modalities, num_copies = load.shape
    table = load.reshape(num_layers * num_modalities, num_copies)
    axis.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=max(1.0, float(table.max())))
    parts = parts or [f"layer {layer}" for layer in range(num_layers)]
    labels = [f"{part}  {name}" if i == 0 else name for part in parts for i, name in enumerate(names)]
    axis.set_yticks(range(len(table)), labels, fontsize=7)
    axis.set_xticks(range(num_copies), [str(i) for i in range(num_copies)])
    axis.set_xlabel("copy of the feed-forward bank, share of the modality's tokens")
    for layer in range(1, num_layers):
        axis.axhline(layer * num_modalities - 0.5, color="white", linewidth=2)
    if num_copies <= 16:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                if value >= 0.005:
                    axis.text(
                        x,
                        y,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if value > 0.6 else "black",
                    )


def _wrap(text: str, width: int = 18, lines: int = 3) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="…"))
