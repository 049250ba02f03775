"""How much of an answer each form of it shows: just as much as its bound says, and what is left out is said."""

import io

import pytest
from dumps import dump, noisy, random
from msgspec.structs import replace
from rich.console import Console

from checkpoints.answers.diff import Verdict
from checkpoints.points import LAYER_KINDS
from parity.diff.compare import comparison
from reports.beside import lines
from reports.findings import ReportSection
from reports.flow import flows
from reports.markdown import markdown
from reports.report import Report
from reports.terminal import print_verdict

# Points of four layers whose rows do not grow with the position.
NAMES = [f"blk.{layer}.{kind.name}" for layer in range(4) for kind in LAYER_KINDS if "t+1" not in kind.row]


def report(names: list[str]) -> Report:
    """Two sides that agree at these points."""
    arrays = random(names, positions=2)
    ours, ref = dump(noisy(arrays)), dump(arrays)
    compared = comparison(ours, ref)
    return Report(compared.verdict, ours, ref, compared.picture)


def table(verdict: Verdict) -> list[str]:
    """The lines of a terminal's table below its head."""
    out = io.StringIO()
    print_verdict(Console(file=out, width=120), verdict)
    shown = out.getvalue().splitlines()
    return shown[1 : shown.index("")]


def test_a_screen_lists_24_points() -> None:
    """Twenty-four points are all listed; of twenty-five some are counted, and no more than 24 lines are taken."""
    assert len(table(report(NAMES[:24]).verdict)) == 24
    assert not any(line.startswith("…") for line in table(report(NAMES[:24]).verdict))
    more = table(report(NAMES[:25]).verdict)
    assert any(line.startswith("…") for line in more)
    assert len(more) <= 24


def test_markdown_lists_60_points() -> None:
    """Of 61 points the one that is furthest below its limit is left out."""
    for count in (60, 61):
        rows = [
            line for line in markdown(report(NAMES[:count])).splitlines() if line.startswith("| `blk.") and "agrees" in line
        ]
        assert len(rows) == 60


def test_a_layer_is_drawn_with_120_points() -> None:
    """Of a layer with more points the first ones, in dataflow order, are drawn."""
    whole = report([f"blk.0.node_{number}" for number in range(130)])
    (layer,) = flows(whole.verdict, whole.picture.grid.points, (whole.ref,))["layers"]
    assert sum(node["name"].startswith("blk.0.") for node in layer["nodes"]) == 120


@pytest.mark.parametrize(("rows", "listed"), [(5, 5), (7, 6)])
def test_a_screen_lists_five_rows_of_an_included_answer(rows: int, listed: int) -> None:
    """More rows are counted in one line, which says where they are."""
    section = ReportSection("Part", "a sentence", ("name",), tuple((f"row {number}",) for number in range(rows)))
    shown = [line.plain for line in lines(replace(report(NAMES[:1]), findings=(section,)), 80)]
    assert sum("row " in line or "more" in line for line in shown) == listed
    assert any("… 2 more (--html, --format markdown)" in line for line in shown) is (rows == 7)
