"""A report as Markdown, for a job summary. Names and texts from dumps are put in code spans, in which nothing is markup."""

from collections.abc import Iterator, Sequence

from checkpoints.answers.diff import Difference, Verdict
from checkpoints.answers.drift import Drift

from .beside import spread
from .drift import remarks as drift_remarks
from .drift import sentence, shortened, shown_margin
from .generated import generated
from .numbers import clean, error, limit, of_limit, token, values
from .report import Report, how_it_was_run, prompt
from .sentences import answer, headline, reasons, remarks
from .status import how, status

_POINTS = 60  # rows of points; GitHub refuses a summary of more than 1 MiB


def markdown(report: Report) -> str:
    """The whole report; ends with a line break."""
    return "\n".join(_report(report)) + "\n"


def drift_as_markdown(drift: Drift) -> str:
    """A check against golden dumps; ends with a line break."""
    return "\n".join(_drift(drift)) + "\n"


def _report(report: Report) -> Iterator[str]:
    verdict = report.verdict
    yield f"## {text(headline(verdict))}"
    yield ""
    yield text(answer(verdict)) + "."
    prompt_text, tokens = prompt(report)
    if tokens:
        yield f"Prompt of {tokens} tokens: {code(prompt_text)}"
    yield from _difference(report)
    yield from _reasons(verdict)
    if verdict.points:
        yield "\n### Error along the model\n"
        yield from _points(report)
    for finding in report.findings:
        yield f"\n### {text(finding.title)}\n\n{text(finding.sentence)}\n"
        if finding.rows:
            yield from table(finding.columns, [tuple(map(text, row)) for row in finding.rows])
    yield from _generated(report)
    yield "\n### How it was run\n"
    yield from (f"- **{name}**: {text(finding)}" for name, finding in remarks(verdict))
    limits = verdict.limits
    yield f"- limit {limit(limits.operations)}, logits {limit(limits.logits)}: {text(limits.source)}\n"
    yield from table(("", "ours", "reference"), [(text(name), code(a), code(b)) for name, a, b in how_it_was_run(report)])


def _difference(report: Report) -> Iterator[str]:
    """The first divergence, or the record that is closest to its limit, and both sides' rows there."""
    verdict, picture = report.verdict, report.picture
    shown = verdict.first_divergence or verdict.worst
    if shown is None:
        return
    yield f"\n### {'First divergence' if verdict.first_divergence else 'Closest to its limit'}\n"
    truth = verdict.truth.values if verdict.truth is not None else ()
    yield from _shown(shown, truth, failed=verdict.first_divergence is not None)
    sides = (("ours", picture.ours), ("reference", picture.ref), ("float64", picture.truth))
    yield from (f"- {name}: {figures}" for name, side in sides if side is not None and (figures := spread(side)))


def _reasons(verdict: Verdict) -> Iterator[str]:
    """What explains the divergence, and what to record next."""
    lines = [f"- **{name or '…'}**: {text(sentence_)}" for name, sentence_ in reasons(verdict)]
    if verdict.next:
        wider = f" --slice {verdict.next_slice}" if verdict.next_slice else ""
        lines.append(f"- **next**: record these on both sides and run diff again: {code(f'--points {verdict.next!r}{wider}')}")
    yield from ["", *lines] if lines else []


def _generated(report: Report) -> Iterator[str]:
    choices = generated(report.ours, report.ref)
    if not choices:
        return
    yield "\n### Generated text\n"
    rows = [
        (
            str(choice.position),
            code(choice.ours),
            code(choice.ref),
            "" if choice.same else "**differs**",
            "" if choice.margin is None else f"{choice.margin:.3g}",
        )
        for choice in choices
    ]
    yield from table(("position", "ours", "reference", "", "margin"), rows)


def _shown(difference: Difference, truth: tuple[float, ...], *, failed: bool) -> Iterator[str]:
    named = " ".join(
        [str(difference.token_idx), code(token(difference.token)) if difference.token is not None else ""]
    ).rstrip()
    yield from table(
        ("point", "layer", "position", "NMSE", "of limit", "largest \\|Δ\\|", "error"),
        [
            (
                code(difference.checkpoint),
                "" if difference.layer is None else str(difference.layer),
                named,
                error(difference.nmse),
                of_limit(difference.of_limit),
                error(difference.max_abs),
                how(difference) if failed else "",
            )
        ],
    )
    if difference.ours or difference.ref:
        sides = {"ours": difference.ours, "reference": difference.ref} | ({"float64": truth} if truth else {})
        texts = values(*sides.values())
        width = max(map(len, texts))
        yield ""
        yield from table(
            ("", *map(str, range(width))),
            [(name, *row, *[""] * (width - len(row))) for name, row in zip(sides, texts, strict=True)],
        )


def _points(report: Report) -> Iterator[str]:
    every = report.verdict.points
    telling = sorted(range(len(every)), key=lambda n: (every[n].failed == 0, -every[n].worst.of_limit))[:_POINTS]
    rows: list[tuple[str, ...]] = [
        (
            code(point.checkpoint),
            str(point.records),
            error(point.worst.nmse),
            of_limit(point.worst.of_limit),
            str(point.worst.token_idx),
            status(report.verdict, point) + (f", {point.failed} of {point.records} wrong" if point.failed else ""),
        )
        for point in (every[n] for n in sorted(telling))
    ]
    head: tuple[str, ...] = ("checkpoint", "records", "worst NMSE", "of limit", "at", "")
    if truth := {point.checkpoint: point for point in report.verdict.truth_points}:
        head = (*head, "ours – float64", "reference – float64")
        far = [truth.get(every[n].checkpoint) for n in sorted(telling)]
        rows = [
            (*row, *(("", "") if errors is None else (error(errors.ours), error(errors.ref))))
            for row, errors in zip(rows, far, strict=True)
        ]
    yield from table(head, rows)
    if len(every) > len(telling):
        yield f"\n{len(every) - len(telling)} further points are closer to the reference than these."


def _drift(drift: Drift) -> Iterator[str]:
    yield f"## {text(sentence(drift))}\n"
    yield f"- golden: {text(drift.golden)}\n- checked: {text(drift.side)}"
    yield from (f"- **{name or '…'}**: {text(remark)}" for name, remark in drift_remarks(drift))
    for item in drift.checked:
        first = item.verdict.first_divergence
        if not item.verdict:
            where = f"{code(first.checkpoint)}, position {first.token_idx}" if first else "records are missing"
            yield f"- **drift** in prompt {code(shortened(item.prompt))}: {where}"
    yield ""
    rows = [
        (code(point.checkpoint), error(point.nmse), of_limit(point.of_limit), shown_margin(point.margin))
        for point in sorted(drift.points, key=lambda point: -point.of_limit)[:_POINTS]
    ]
    yield from table(("checkpoint", "worst NMSE", "of limit", "margin"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table whose cells are Markdown already."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def text(value: str) -> str:
    """Text that Markdown and HTML show as it is."""
    escaped = clean(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|~#":
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped


def code(value: str) -> str:
    """A code span, in a table's cell too; empty for no text."""
    cleaned = clean(value)
    if not cleaned:
        return ""
    fence = "`" * (1 + max((len(run) for run in "".join(c if c == "`" else " " for c in cleaned).split()), default=0))
    pad = " " if cleaned.startswith("`") or cleaned.endswith("`") else ""
    return f"{fence}{pad}{cleaned.replace('|', chr(92) + '|')}{pad}{fence}"
