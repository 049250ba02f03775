"""What a terminal shows beside a verdict: both sides' distributions, other commands' answers, the first differing choice."""

from collections.abc import Iterator

from rich.text import Text

from checkpoints.answers.picture import Spread

from .generated import generated
from .layout import labelled
from .numbers import clean, count
from .report import Report

_ROWS = 5  # of a finding's table: the screen is the verdict's; the HTML and Markdown reports have them all


def lines(report: Report, width: int) -> Iterator[Text]:
    """These lines; none if there is nothing to say."""
    rows: list[tuple[str, str]] = []
    if report.verdict.first_divergence is not None:
        sides = (("ours", report.picture.ours), ("ref", report.picture.ref), ("f64", report.picture.truth))
        rows += [("spread", f"{name}  {figures}") for name, side in sides if side is not None and (figures := spread(side))]
    differing = [choice for choice in generated(report.ours, report.ref) if not choice.same]
    if differing:
        first = differing[0]
        margin = "" if first.margin is None else f", margin {first.margin:.3g}"
        where = f"{count(len(differing), 'choice')} of the generated text differ, the first at position {first.position}"
        rows.append(("choices", f"{where}: ours {first.ours}, ref {first.ref}{margin}"))
    for finding in report.findings:
        rows.append((clean(finding.title), clean(finding.sentence)))
        rows += [(clean(finding.title), "  ".join(map(clean, row))) for row in finding.rows[:_ROWS]]
        if len(finding.rows) > _ROWS:
            rows.append((clean(finding.title), f"… {len(finding.rows) - _ROWS} more (--html, --format markdown)"))
    yield from labelled(rows, width)
    if rows:
        yield Text("")


def spread(side: Spread) -> str:
    """One side's row in words: the number of elements, their range, mean and standard deviation; empty if unknown."""
    if side.n is None or side.low is None or side.high is None:
        return ""
    middle = "" if side.mean is None or side.deviation is None else f", mean {side.mean:.6g} ± {side.deviation:.6g}"
    return f"{side.n:,} elements, {side.low:.6g} … {side.high:.6g}{middle}"
