"""Answers of `parity lint`, `isolate` and `explain` (their --format json) as sections of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from checkpoints.errors import InputError

from .numbers import clean, count, error, ranges


class ReportSection(Struct, frozen=True):
    """One answer: a title, the answer in a sentence, and a table of texts.

    `verdict` is the sentence and whether it is parity, if the whole report is headed by it and not by the comparison of two sides.
    """

    title: str
    sentence: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    verdict: tuple[str, bool] | None = None


def finding(answer: Any, name: str) -> ReportSection:
    """The section of a report for one command's JSON answer; `name` is the file that it came from.

    Raises:
        InputError: it is not an answer of lint, isolate or explain.
    """
    if isinstance(answer, Mapping):
        # An explanation has a list of operations, too.
        for key, make in (("causes", _explain), ("operations", _isolate), ("findings", _lint)):
            if isinstance(answer.get(key), list) and all(isinstance(item, Mapping) for item in answer[key]):
                return make(answer, answer[key])
    raise InputError(
        f"{name} is not an answer of `parity lint`, `isolate` or `explain`.",
        "Write one with --format json > FILE.",
        code="include",
    )


def _isolate(_answer: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]) -> ReportSection:
    """Right operations are counted by kind: a hundred rows that all say "proven" would tell less."""
    status = [str(item.get("status")) for item in operations]
    wrong = [item for item in operations if item.get("status") == "wrong"]
    proven = status.count("proven")
    summary = f"{proven} of {count(len(operations), 'operation')} proven right on the reference's own inputs"
    summary += f", {len(wrong)} wrong" if wrong else ""
    summary += f", {status.count('not observable')} not observable" if "not observable" in status else ""
    rows = [_texts(item, "operation", "layer", "status", "nmse") for item in wrong]
    for kind in dict.fromkeys(str(item.get("operation")) for item in operations):
        right = [item for item in operations if str(item.get("operation")) == kind and item.get("status") == "proven"]
        if right:
            errors = [item["nmse"] for item in right if isinstance(item.get("nmse"), (int, float))]
            layers = count(len(right), "layer") if len(right) > 1 else _text(right[0].get("layer"))
            rows.append((clean(kind), layers, "proven", error(max(errors, default=None))))
    return ReportSection("Operation by operation", summary, ("operation", "layer", "status", "NMSE"), tuple(rows))


def _lint(answer: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> ReportSection:
    if not findings:
        summary = "nothing found: this dump can be trusted"
    else:
        summary = count(len(findings), "finding") + ("" if answer.get("usable", True) else ": do not compare this dump")
    names = ("severity", "rule", "checkpoint", "token_idx", "evidence", "advice")
    return ReportSection("Can the dump be trusted?", summary, names, tuple(_texts(item, *names) for item in findings))


def _explain(answer: Mapping[str, Any], causes: Sequence[Mapping[str, Any]]) -> ReportSection:
    """Faults that give the same numbers are listed below the one they are equivalent to."""
    rows: list[tuple[str, ...]] = []
    for cause in causes:
        rows.append(
            (
                *_texts(cause, "fault", "sentence"),
                _layers(cause.get("layers")),
                _share(cause.get("explained")),
                _error(cause.get("nmse")),
                *_texts(cause, "fix"),
            )
        )
        same = cause.get("equivalent")
        others = [other for other in same if isinstance(other, Mapping)] if isinstance(same, list) else []
        rows += [(*_texts(other, "fault", "sentence"), _layers(other.get("layers")), "the same", "", "") for other in others]
    return ReportSection(
        "Which known fault is it?",
        _explained(answer, len(causes)),
        ("fault", "what it does", "layers", "explains", "NMSE", "fix"),
        tuple(rows),
    )


def _explained(answer: Mapping[str, Any], causes: int) -> str:
    """What an explanation says before its causes; what they leave unexplained, and the law that it follows, are part of the answer."""
    if answer.get("verdict") == "no fault":
        kind = _text(answer.get("precision_only"))
        assumed = ", which nothing states" if answer.get("precision_assumed") is True else ""
        return f"no fault: what differs is what {kind} rounds{assumed}" if kind else "no fault: nothing differs"
    if answer.get("verdict") == "undecided":
        return "undecided: in this arithmetic rounding alone moves the values as far as they are large"
    sentences = [
        f"{count(causes, 'cause')} found that {'reproduces' if causes == 1 else 'reproduce'} these numbers"
        if causes
        else "no known fault reproduces these numbers"
    ]
    place = answer.get("remaining")
    where = _text(place.get("checkpoint")) if isinstance(place, Mapping) else ""
    if causes and where:
        sentences = [f"{count(causes, 'cause')} found; {where} is not explained"]
    if law := _text(answer.get("law")):
        sentences.append(f"at {where} {law}" if where else law)
    if looks := _text(answer.get("looks_like")):
        sentences.append(f"the numbers look like {looks}")
    return "; ".join(sentences)


def _layers(value: Any) -> str:
    """Layers in stretches: a list of numbers can be as long as the model is deep."""
    known = isinstance(value, list) and all(isinstance(layer, int) for layer in value)
    stretches = ranges(tuple(sorted(value))) if known else ""
    return stretches if known and not stretches.endswith("…") else _text(value)


def _error(value: Any) -> str:
    return error(value) if isinstance(value, (int, float)) else _text(value)


def _share(value: Any) -> str:
    return f"{100 * value:.0f} %" if isinstance(value, (int, float)) else ""


def _texts(item: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    return tuple(_text(item.get(name)) for name in names)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return clean(", ".join(f"{name} {_text(part)}" for name, part in value.items()))
    if isinstance(value, list):
        return clean(", ".join(map(_text, value)))
    return clean(str(value))
