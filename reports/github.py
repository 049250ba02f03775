"""GitHub's workflow commands: annotations that stand beside a run. Each is one line, which no text inside it can end."""

from collections.abc import Iterator

from checkpoints.answers.diff import Verdict
from checkpoints.answers.drift import Drift

from .drift import remarks as drift_remarks
from .drift import sentence, shortened
from .sentences import answer, as_far_as_it_goes, headline, reasons


def annotations(verdict: Verdict) -> Iterator[str]:
    """For a divergence an error that says what explains it, for parity a notice; a warning if something was never compared."""
    if verdict:
        yield _command("warning" if as_far_as_it_goes(verdict) else "notice", "parity", answer(verdict))
    else:
        yield _command("error", headline(verdict), "\n".join([answer(verdict), *_named(verdict)]))


def drift_annotations(drift: Drift) -> Iterator[str]:
    """One error per prompt that moved and one warning per finding; a notice if there is neither."""
    for item in drift.checked:
        if not item.verdict:
            lines = [f"prompt {shortened(item.prompt)}", headline(item.verdict), answer(item.verdict), *_named(item.verdict)]
            yield _command("error", "parity drift", "\n".join(lines))
    for name, remark in drift_remarks(drift):
        yield _command("warning", f"parity drift: {name}" if name else "parity drift", remark)
    if drift:
        yield _command("notice", "parity drift", sentence(drift))


def _named(verdict: Verdict) -> list[str]:
    remarks = [f"{name}: {text}" for name, text in reasons(verdict)]
    return [*remarks, f"next: --points '{verdict.next}'"] if verdict.next else remarks


def _command(kind: str, title: str, message: str) -> str:
    # https://docs.github.com/actions/reference/workflow-commands-for-github-actions: %, CR and LF are escaped
    # everywhere, "," and ":" in properties besides.
    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    named = escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={named}::{escaped(message)}"
