"""A conformance run as one HTML file, with the reports of failing cells linked from it."""

from checkpoints.answers.conform import Conformance, axis

from .conform import LETTERS, cause_line, legend, outcome, summary, worst_of
from .html import template


def conform_html(conformance: Conformance) -> str:
    """The whole document: causes, the matrix, every cell; links are relative to the run's folder."""
    types = axis(conformance.results, "type")
    failing = sum(result.wrong for result in conformance.results)
    return template("conform.html").render(
        conformance=conformance,
        headline="nothing is wrong" if conformance else f"{failing} of {len(conformance.results)} cells fail",
        summary=summary(conformance),
        causes=[(cause_line(cause, conformance), cause.sentence) for cause in conformance.causes],
        legend=" · ".join(legend(conformance)),
        types=types,
        matrix=[
            (name, [LETTERS[worst] if (worst := worst_of(conformance, name, column)) else ("", "") for column in types])
            for name in axis(conformance.results, "architecture")
        ],
        cells=[(result, outcome(result)) for result in conformance.results],
    )
