"""A report as one HTML file that opens offline: no server, no network, every text escaped."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.answers.diff import Difference

from .charts import figures
from .files import save
from .generated import generated
from .header import facts
from .numbers import clean, count, error, limit, of_limit, token, values
from .report import Report, how_it_was_run, prompt
from .sentences import answer, headline, place, reasons, remarks
from .status import how, status

if TYPE_CHECKING:
    from jinja2 import Template


_TEMPLATES = Path(__file__).with_name("templates")


def html(report: Report) -> str:
    """The whole document; about 0.5 MB of it are the drawing library."""
    verdict = report.verdict
    first = verdict.first_divergence
    text, tokens = prompt(report)
    ours, ref = report.ours.header, report.ref.header
    head, right = next((section.verdict for section in report.findings if section.verdict), (headline(verdict), bool(verdict)))
    return template("report.html").render(
        verdict=verdict,
        right=right,
        headline=head,
        answer=answer(verdict),
        compared=[row for row in facts(ref or ours, {"ours": ours, "reference": ref}) if row[0] != "tokens"],
        first=first,
        shown=first or verdict.worst,
        reasons=list(reasons(verdict)),
        remarks=list(remarks(verdict)),
        sides=["ours", "reference"] + (["float64"] if verdict.truth is not None and verdict.truth.values else []),
        elements=_elements(first or verdict.worst, verdict.truth.values if verdict.truth is not None else ()),
        points=[(point, status(verdict, point)) for point in verdict.points],
        truth={point.checkpoint: point for point in verdict.truth_points},
        spreads=[("ours", report.picture.ours), ("reference", report.picture.ref), ("float64", report.picture.truth)],
        findings=report.findings,
        choices=generated(report.ours, report.ref),
        prompt=text,
        prompt_tokens=tokens,
        run=how_it_was_run(report),
        figures=figures(verdict, report.picture, (report.ref, report.ours)),
    )


def write_html(report: Report, path: Path) -> None:
    """Write the document.

    Raises:
        InputError: the file cannot be written.
    """
    save(html(report), path)


@cache
def template(name: str) -> "Template":
    """A template of this package, compiled once; everything that it prints is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["asset"] = _asset
    environment.filters |= {
        "error": error,
        "of_limit": of_limit,
        "limit": limit,
        "clean": clean,
        "token": token,
        "count": count,
        "place": place,
        "how": how,
        "number": lambda value: "" if value is None else f"{value:.6g}",
    }
    return environment.get_template(name)


def _asset(name: str) -> Any:
    """A file of the templates folder as it is: style, script, library. Never text of a dump."""
    from markupsafe import Markup

    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def _elements(difference: Difference | None, truth: tuple[float, ...]) -> list[tuple[int, tuple[str, ...], bool]]:
    """(element, its value on each side, is the largest difference) of the values that a verdict carries."""
    if difference is None:
        return []
    sides = [difference.ours, difference.ref, *([truth] if truth else [])]
    tokens = difference.checkpoint == "tokens"
    rows = [[str(int(x)) for x in row] for row in sides] if tokens else values(*sides)
    longest = max(map(len, rows))
    padded = [row + [""] * (longest - len(row)) for row in rows]
    base = difference.token_idx if tokens else 0
    return [(base + n, cells, n == difference.index) for n, cells in enumerate(zip(*padded, strict=True))]
