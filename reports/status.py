"""What is said of a point, or of the first divergence, in a few words: the same in the terminal, in HTML, Markdown and JUnit."""

from checkpoints.answers.diff import FRESH, GROWN, Difference, PointSummary, Verdict

_WORDS = {FRESH: "error jumps again", GROWN: "grown slowly"}


def status(verdict: Verdict, point: PointSummary) -> str:
    """Whether a point agrees, and where its error comes from if it does not."""
    first = verdict.first_divergence
    if point.failed and first is not None:
        if first.checkpoint == point.checkpoint:
            return "first divergence" if first.fresh else "first divergence, grown slowly"
        if any(origin.first.checkpoint == point.checkpoint for origin in verdict.origins):
            return "not caused by the first"
    return _WORDS.get(point.status, point.status)


def how(first: Difference) -> str:
    """How the error of a first divergence came about."""
    return "jumps here" if first.fresh else "grew slowly until it was over the limit"
