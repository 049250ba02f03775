"""A conformance run as one HTML file, with the reports of failing cells behind it."""

from checkpoints.answers.conform import Conformance, axis

from .conform import LETTERS, legend, outcome, said, summary, worst_of
from .html import template


def conform_html(found: Conformance) -> str:
    """The whole document: causes, the matrix, every cell; links are relative to the run's folder."""
    types = axis(found.results, "type")
    failing = sum(result.wrong for result in found.results)
    return template("conform.html").render(
        found=found,
        headline="nothing is wrong" if found else f"{failing} of {len(found.results)} cells fail",
        summary=summary(found),
        causes=[(said(cause, found), cause.sentence) for cause in found.causes],
        legend=" · ".join(legend(found)),
        types=types,
        matrix=[
            (name, [LETTERS[worst] if (worst := worst_of(found, name, column)) else ("", "") for column in types])
            for name in axis(found.results, "architecture")
        ],
        cells=[(result, outcome(result)) for result in found.results],
    )
