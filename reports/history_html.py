"""The margins of a ledger over commits, drawn: one HTML file like a report."""

from collections.abc import Sequence

from checkpoints.answers.drift import Entry

from .drift import shown_margin
from .history import groups, margin
from .html import template
from .numbers import clean

_CHECKS = 2000  # checks that are drawn; of more the last ones: a screen is no wider


def history_html(entries: Sequence[Entry], findings: Sequence[str]) -> str:
    """The whole document: for each side and set of golden dumps its margins over commits, and a table of the points."""
    parts = []
    for label, every in groups(entries):
        group = every[-_CHECKS:]
        names = list(dict.fromkeys(name for entry in group for name in entry.points))
        parts.append(
            {
                "label": label,
                "checks": len(every),
                "last": every[-1],
                "rows": [(clean(name), *_margins(every, name)) for name in names],
                "drawn": {
                    "label": label,
                    "points": [clean(name) for name in names],
                    "times": [entry.time for entry in group],
                    "commits": [entry.commit[:12] for entry in group],
                    "of_limit": [
                        [_figure(entry.points[name][2]) if name in entry.points else None for entry in group] for name in names
                    ],
                },
            }
        )
    figures = [part["drawn"] for part in parts]
    beyond = [label for label, every in groups(entries) if every[-1].verdict != "parity"]
    return template("history.html").render(parts=parts, findings=findings, figures=figures, beyond=beyond)


def _margins(group: Sequence[Entry], name: str) -> tuple[str, str, str]:
    known = [entry.points[name][2] for entry in group if name in entry.points]
    return shown_margin(margin(known[0])), shown_margin(margin(max(known))), shown_margin(margin(known[-1]))


def _figure(value: float) -> float | None:
    """Three digits are more than a picture shows; an infinite error is drawn beyond everything."""
    return float(f"{value:.3g}") if value < 1e12 else 1e12
