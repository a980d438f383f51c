"""The page of sources and licences that every built corpus carries."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from omnimoe.data import speech
from omnimoe.data.sources import Source

_PERMISSIVE = "Every source allows use, change and distribution, some with credit."
_COPYLEFT = (
    "**Not all of this may be passed on freely.** The stamps and their recordings are GPL-2.0, the English, Spanish "
    "and French prompts CC-BY-SA-3.0. They were fetched to this machine by its user."
)

WEIGHTS_OF_S = """## What may be done with weights trained on set S

This is how the project handles it, not legal advice. Whether weights are a work derived from what they were trained on
is not settled, and differs between countries.

- Training, studying and using such weights yourself: the licences of all sources allow it.
- The folder itself, its tokens, and anything a model gives back that is recognisably one of the sources: under the
  terms of that source. That is GPL-2.0 for a stamp, its caption or recording, CC-BY-SA-3.0 for an English, Spanish or
  French prompt, with credit.
- Publishing the weights: say that GPL-2.0 and CC-BY-SA-3.0 works were among the training data, keep this page beside
  them, and do not put a permissive licence on them without advice of your own. The project publishes weights of set P
  alone.

The licences: GPL-2.0, https://www.gnu.org/licenses/old-licenses/gpl-2.0.html; CC-BY-SA-3.0,
https://creativecommons.org/licenses/by-sa/3.0/; CC-BY-3.0, https://creativecommons.org/licenses/by/3.0/.
"""


def license_page(name: str, sources: Sequence[Source], side: int, *, permissive: bool = True) -> str:
    """What a corpus is made of, under which licences and by whom, in Markdown.

    Args:
        name: of the set: ``"P"``.
        sources: all of them.
        side: width and height of its pictures in pixels.
        permissive: whether all of it may be passed on; if not, the page says what may be done with weights.
    """
    lines = [
        f"# Sources and licences of set {name}",
        "",
        f"{_PERMISSIVE if permissive else _COPYLEFT} Pictures were rendered to {side} x {side} pixels on white; "
        "that is the only change. Set names in `rows.jsonl` are those of the first column.",
        "",
        "| source | what is used | licence | credit | package |",
        "|---|---|---|---|---|",
    ]
    for source in sources:
        package = f"{source.kind} {source.package} {source.version}"
        lines.append(
            f"| {source.name} | {source.used} | {source.license} | [{source.credit}]({source.homepage}) | {package} |"
        )
    lines.append(
        f"| speech | speech of the captions | {speech.HIBARI_LICENSE} | {speech.HIBARI_CREDIT} | wheel hibari-tts |"
    )
    notices = files("omnimoe.data").joinpath("NOTICES.md").read_text(encoding="utf-8")
    if not permissive:
        notices = WEIGHTS_OF_S + "\n" + notices.partition("**Left out on purpose.**")[0]
    return "\n".join(lines) + "\n\n" + notices
