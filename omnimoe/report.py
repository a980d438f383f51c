"""A one-page HTML report: text, tables and pictures in one file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 1px solid #8888; font-weight: 600; }
img { max-width: 100%; background: white; }
pre { background: #8881; padding: .7rem; overflow-x: auto; } .quiet { opacity: .7; }
"""


class Report:
    """Collects sections and writes them as one page.

    Args:
        title: of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, *, quiet: bool = False) -> None:
        """A paragraph."""
        self._parts.append(f'<p class="{"quiet" if quiet else ""}">{html.escape(text)}</p>')

    def code(self, text: str) -> None:
        """Lines to copy."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column names the row."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, path: Path, alternative: str) -> None:
        """A PNG, copied into the page."""
        self._parts.append(f'<p><img alt="{html.escape(alternative)}" src="{_inline(path, "image/png")}"></p>')

    def sound(self, path: Path, caption: str) -> None:
        """A WAV file, copied into the page, with a player."""
        self._parts.append(
            f'<p>{html.escape(caption)}<br><audio controls src="{_inline(path, "audio/wav")}"></audio></p>'
        )

    def write(self, path: Path) -> Path:
        """Writes the page."""
        title = html.escape(self.title)
        path.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
            f"<body><h1>{title}</h1>\n" + "\n".join(self._parts) + "\n</body></html>\n",
            encoding="utf-8",
        )
        return path


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
