"""The tables of docs/comparison.md: what was measured, the papers' figures beside it, and which findings appear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omnimoe.compare import ALL, Comparison, spread

PANELS = {
    "towers": ("dense", "mot", "mot_text_alone", "mot_image_alone", "mot_speech_alone", "mot_networks", "mot_matrices"),
    "experts that choose": ("dense", "moma_1t1i1s", "moma_2t2i2s", "moma_4t4i4s", "moe4x", "moe12x", "momad_4t4i4s"),
    "token choice, hybrid": ("dense", "mot", "moma", "moe", "mot_moe"),
    "state spaces": ("dense", "mamba", "mixture_of_mamba"),
}
"""Rows of the picture of curves."""

PUBLISHED: dict[str, tuple[str, str, str, str]] = {
    "mot": ("53-66 %", "20-35 %", "15-20 %", "37M to 7B, speech 443M to 1.5B"),
    "mot_text_alone": ("55 %", "32 %", "30 %", "443M; `mot` there 56, 26 and 15 %"),
    "mot_image_alone": ("68 %", "27 %", "65 %", "443M"),
    "mot_speech_alone": ("88 %", "89 %", "15 %", "443M"),
    "mot_moe": ("43 %", "26 %", "–", "443M; `mot` there 61 and 27 %"),
    "moma_4t4i4s": ("38 %", "19 %", "–", "1.4B, two modalities"),
    "moe4x": ("53-73 %", "36-101 %", "–", "37M to 7B"),
    "moe12x": ("33 %", "36 %", "–", "1.4B, eight experts, two modalities"),
    "momad_4t4i4s": ("29 %", "19 %", "–", "1.4B, two modalities"),
    "mixture_of_mamba": ("65 %", "43 %", "25 %", "1.4B, of dense Mamba's; speech with three modalities"),
}
"""Share of the dense model's training FLOPs: text, image, speech, and at what size. Training losses throughout, so
experts that choose look ahead; MoMa's factors are given as their inverse."""

PUBLISHED_TIME: dict[str, tuple[str, str, str, str]] = {
    "mot": ("–", "76 %", "47 %", "256 A100"),
    "moe4x": ("–", "none saved", "170 %", "256 A100"),
    "moma_1t1i1s": ("1.06", "–", "–", "435M, two modalities, 256 A100"),
    "moma_4t4i4s": ("1.21", "–", "–", "435M, two modalities, 256 A100"),
    "moe12x": ("1.10", "–", "–", "435M, eight experts, two modalities, 256 A100"),
    "momad_4t4i4s": ("1.45", "–", "–", "435M, two modalities, 256 A100"),
}
"""Time of a step over the dense model's, and share of its time for text and for image; MoMa's words a second are given
as their inverse."""

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
"""Marks of a page, between which the tables stand."""

Side = tuple[str, str]
CLAIMS: tuple[tuple[str, Side, Side | None], ...] = (
    ("MoT needs fewer steps than dense for text", ("mot", "text"), None),
    ("... for pictures", ("mot", "image"), None),
    ("... for speech", ("mot", "speech"), None),
    ("MoT saves more on pictures than on text", ("mot", "image"), ("mot", "text")),
    ("MoT beats MoE-4x on pictures", ("mot", "image"), ("moe4x", "image")),
    ("... and on text", ("mot", "text"), ("moe4x", "text")),
    ("untied networks alone save on pictures", ("mot_networks", "image"), None),
    ("untied attention saves further on pictures", ("mot_matrices", "image"), ("mot_networks", "image")),
    ("... and on text", ("mot_matrices", "text"), ("mot_networks", "text")),
    ("merging text and pictures hurts pictures", ("mot", "image"), ("mot_speech_alone", "image")),
    ("... and text", ("mot", "text"), ("mot_speech_alone", "text")),
    ("merging text and speech hurts speech", ("mot", "speech"), ("mot_image_alone", "speech")),
    ("merging pictures and speech hurts speech", ("mot", "speech"), ("mot_text_alone", "speech")),
    ("experts in the text tower save further on text", ("mot_moe", "text"), ("mot", "text")),
    ("MoMa 1t1i1s saves on pictures", ("moma_1t1i1s", "image"), None),
    ("more text experts save on text, 2 after 1", ("moma_2t2i2s", "text"), ("moma_1t1i1s", "text")),
    ("... 4 after 2", ("moma_4t4i4s", "text"), ("moma_2t2i2s", "text")),
    ("MoMa beats as many blind experts on pictures", ("moma_4t4i4s", "image"), ("moe12x", "image")),
    ("blind experts beat 1t1i1s on text", ("moe12x", "text"), ("moma_1t1i1s", "text")),
    ("blind experts beat MoMa on text", ("moe12x", "text"), ("moma_4t4i4s", "text")),
    ("mixture of depths adds to MoMa, looking ahead", ("momad_4t4i4s", ALL), ("moma_4t4i4s", ALL)),
    ("Mixture-of-Mamba needs fewer steps than Mamba for text", ("mixture_of_mamba", "text"), None),
    ("... for pictures", ("mixture_of_mamba", "image"), None),
    ("... for speech", ("mixture_of_mamba", "speech"), None),
)
"""A published finding: the left needs a smaller share of the baseline's steps than the right, or than all of them."""


def page(results: dict[str, dict[str, Any]], num_seeds: int) -> str:
    """All tables in Markdown.

    Args:
        results: size to what ``--save`` wrote.
        num_seeds: seeds that are planned.
    """
    parts = [table(size, plain, num_seeds) for size, plain in results.items()]
    return "\n".join([findings(results), beside_papers(results), time_beside_papers(results), *parts]).strip() + "\n"


def write(path: Path, tables: str) -> None:
    """Puts the tables into a page.

    Raises:
        ValueError: if the page has no marks for them.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END} to put tables between; write them where they belong")
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}")


def table(size: str, plain: dict[str, Any], num_seeds: int) -> str:
    """Shares and final losses of one size, a line a model and form; the time of each model."""
    comparison = Comparison.from_dict(plain)
    settings, kinds = comparison.settings, comparison.modalities
    done = sum(len(runs) for runs in comparison.histories.values())
    names = ["all" if kind == ALL else kind for kind in kinds]
    shares = [["model", "scored", "n", "FLOPs", *(f"steps: {name}" for name in names), "loss less baseline's: all"]]
    times = [["model", "a step, of the baseline's time", *(f"time: {name}" for name in names)]]
    told: set[str] = set()
    for row in comparison.rows():
        name, is_base, clock = row["model"], row["model"] == row["baseline"], plain["times"].get(row["model"])
        cost = "–" if row["flops_ratio"] is None else f"{row['flops_ratio']:.3f}"
        found = ["100 %" if is_base else percent(row["share"][kind]) for kind in kinds]
        gap = f"{row['loss'][ALL]['mean']:.3f} itself" if is_base else signed(row["gap"][ALL])
        shares.append([f"`{name}`", row["scored"], str(len(row["seeds"])), cost, *found, gap])
        if clock is not None and name not in told:
            told.add(name)
            spent = [percent(times_as_long(row["share"][kind], clock["ratio"])) for kind in kinds]
            times.append([f"`{name}`", f"{clock['ratio']:.2f}", *spent])
    pictures = {"share of the baseline's steps": "-shares", "held-out loss against steps": ""}
    lines = [
        f"### {size}",
        "",
        f"{settings.steps} steps of {settings.tokens_per_step:,} tokens; {done} of {num_seeds * len(plain['planned'])} "
        f"runs are finished.",
        "",
        *in_markdown(shares),
        "",
        *(in_markdown(times) if told else ["Steps were not timed."]),
        "",
        *(f"![{size}: {what}](../benchmarks/results/{plain['stem']}{tail}.png)" for what, tail in pictures.items()),
        "",
    ]
    return "\n".join(lines)


def in_markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a table, whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def beside_papers(results: dict[str, dict[str, Any]]) -> str:
    """The published shares and ours, in the papers' form: training-time routing, which looks ahead."""
    compared = {size: Comparison.from_dict(plain) for size, plain in results.items()}
    kinds = ("text", "image", "speech")
    rows = [["architecture", *(f"{who}: {kind}" for who in ("paper", *compared) for kind in kinds), "the paper's size"]]
    for architecture, (*figures, where) in PUBLISHED.items():
        ours = [
            percent(spread([*shares_of(comparison, f"{architecture}_{size}", kind).values()]))
            for size, comparison in compared.items()
            for kind in kinds
        ]
        rows.append([f"`{architecture}`", *figures, *ours, where])
    return "\n".join(["### Beside the papers", "", *in_markdown(rows), ""])


def time_beside_papers(results: dict[str, dict[str, Any]]) -> str:
    """The published times and ours: of a step, and for the dense model's loss."""
    compared = {size: Comparison.from_dict(plain) for size, plain in results.items()}
    heads = ("a step", "text", "image")
    rows = [["architecture", *(f"{who}: {head}" for who in ("paper", *compared) for head in heads), "the paper's, on"]]
    for architecture, (*figures, where) in PUBLISHED_TIME.items():
        ours = []
        for size, comparison in compared.items():
            name = f"{architecture}_{size}"
            clock = results[size]["times"].get(name)
            ours.append("–" if clock is None else f"{clock['ratio']:.2f}")
            for kind in heads[1:]:
                share = spread([*shares_of(comparison, name, kind).values()])
                ours.append("–" if clock is None else percent(times_as_long(share, clock["ratio"])))
        rows.append([f"`{architecture}`", *figures, *ours, where])
    return "\n".join(["### Time beside the papers", "", *in_markdown(rows), ""])


def findings(results: dict[str, dict[str, Any]]) -> str:
    """Which published findings appear: a difference of shares, seed by seed, with its interval."""
    compared = {size: Comparison.from_dict(plain) for size, plain in results.items()}
    rows = [["finding", *compared]]
    words: dict[str, list[str]] = {size: [] for size in compared}
    for sentence, left, right in CLAIMS:
        told = [verdict(differences(comparison, size, left, right)) for size, comparison in compared.items()]
        rows.append([sentence, *told])
        for size, found in zip(words, told, strict=True):
            words[size].append(found.partition(",")[0])
    sums = []
    for size, found in words.items():
        few = found.count("–") + found.count("one seed")
        sums.append(
            f"{size}: of {len(CLAIMS)} findings {found.count('yes')} appear, {found.count('no')} are reversed, "
            f"{found.count('not told')} cannot be told from chance, {few} have too few runs"
        )
    return "\n".join(["### Findings", "", *in_markdown(rows), "", *(f"{told}.\n" for told in sums)])


def differences(comparison: Comparison, size: str, left: Side, right: Side | None) -> list[float]:
    """Share of the left less that of the right, or less one, for each seed that both have."""
    mine, theirs = (shares_of(comparison, f"{name}_{size}", kind) for name, kind in (left, right or left))
    return [mine[seed] - (1.0 if right is None else theirs[seed]) for seed in mine if seed in theirs]


def shares_of(comparison: Comparison, name: str, kind: str) -> dict[int, float]:
    """Shares by seed in the form that the papers give, which is that of training; none of what is not finished."""
    if not comparison.histories.get(name):
        return {}
    return comparison.shares(name, kind, comparison.forms(name)[0])


def verdict(found: list[float]) -> str:
    """What an interval says of a difference that should be negative."""
    told = spread(found)
    if told is None or told["mean"] is None:
        return "–"
    mean, half = told["mean"], told["half"]
    if half is None:
        return f"one seed, {100 * mean:+.0f}"
    word = "yes" if mean + half < 0 else "no, the opposite" if mean - half > 0 else "not told"
    return f"{word}, {100 * mean:+.0f} ± {100 * half:.0f}"


def times_as_long(share: dict[str, float | None] | None, ratio: float) -> dict[str, float | None] | None:
    """A share of steps as one of time, where a step takes so many times as long."""
    return share and {name: None if value is None else value * ratio for name, value in share.items()}


def percent(told: dict[str, float | None] | None) -> str:
    """A share with half its interval; a dash where nothing was shared."""
    if told is None or told["mean"] is None:
        return "–"
    half = "" if told["half"] is None else f" ± {100 * told['half']:.0f}"
    return f"{100 * told['mean']:.0f}{half} %"


def signed(told: dict[str, float | None] | None) -> str:
    """A difference of losses with half its interval."""
    if told is None or told["mean"] is None:
        return "–"
    return f"{told['mean']:+.3f}" + ("" if told["half"] is None else f" ± {told['half']:.3f}")


def rounded(held: Any) -> Any:
    """Plain values with floats of six digits, so that a result is read and kept easily."""
    if isinstance(held, dict):
        return {key: rounded(value) for key, value in held.items()}
    if isinstance(held, list | tuple):
        return [rounded(value) for value in held]
    return float(f"{held:.6g}") if isinstance(held, float) else held
