"""The result of checking weights, as text and as JSON."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

from rich.text import Text

from checkpoints.answers.weights import NOT_CHECKED, FirstDifference, TensorCheck, WeightsCheck
from checkpoints.structs import as_dict

from .layout import columns, labelled
from .numbers import clean, count

_SHOWN = 24
_BYTES = 48  # of a differing block, in hex


def lines(check: WeightsCheck, width: int) -> Iterator[Text]:
    """The whole answer, for a terminal of `width` columns."""
    head = [("model", clean(check.model))]
    if check.theirs:
        head.append(("theirs", clean(check.theirs)))
    yield from labelled([*head, *(("note", clean(note)) for note in check.notes)], width)
    yield Text("")
    yield from _table(check, width)
    yield Text("")
    wrong = [tensor for tensor in check.tensors if not tensor.right]
    for tensor in wrong[:_SHOWN]:
        yield Text(f"{clean(tensor.name)}: {clean(tensor.reason or tensor.status)}", style="bold red")
        if tensor.first is not None:
            yield from labelled(list(_first(tensor.first)), width, indent=2)
    if len(wrong) > _SHOWN:
        yield Text(f"and {count(len(wrong) - _SHOWN, 'further tensor')}: --format json lists them")
    yield _answer(check, len(wrong))


def _table(check: WeightsCheck, width: int) -> list[Text]:
    groups: dict[tuple[str, str], list[TensorCheck]] = {}
    for tensor in check.tensors:
        status = tensor.status.partition(":")[0]
        groups.setdefault((tensor.type, status), []).append(tensor)
    rows: list[tuple[str, ...]] = [("type", "tensors", "values", "status", "by")]
    for (kind, status), group in groups.items():
        values = f"{sum(tensor.elements for tensor in group):,}"
        rows.append(
            (kind, str(len(group)), values, status, " = ".join(group[0].by) or group[0].reason * (status == NOT_CHECKED))
        )
    styles = ["dim", *("" if group[0].right else "bold red" for group in groups.values())]
    return columns(rows, frozenset({1, 2}), styles, width)


def _first(first: FirstDifference) -> Iterator[tuple[str, str]]:
    block = "" if first.block == first.element else f", block {first.block:,}"
    yield "first at", f"element {first.element:,}{block}"
    if first.bytes:
        yield "bytes", first.bytes[:_BYTES] + ("…" if len(first.bytes) > _BYTES else "")
    for name, value in first.values.items():
        yield name, f"{value:.9g}"


def _answer(check: WeightsCheck, wrong: int) -> Text:
    checked = [tensor for tensor in check.tensors if tensor.status != NOT_CHECKED]
    sentence = f"{len(checked) - wrong} of {count(len(check.tensors), 'tensor')} equal, tolerance {check.tolerance}"
    skipped = len(check.tensors) - len(checked)
    sentence += f", {skipped} not checked" if skipped else ""
    if check.seen < check.values:
        sentence += f"; seen were {check.seen:,} of their {check.values:,} values"
    style = "bold red" if wrong else "bold green" if check.seen == check.values else "bold"
    return Text(f"{_verdict(check)}: {sentence}", style=style)


def _verdict(check: WeightsCheck) -> str:
    return "wrong" if not check else "right" if check.seen == check.values else "right where seen"


def as_json(check: WeightsCheck) -> dict[str, Any]:
    """One JSON object: `tensors` with `name`, `type`, `status` each, and the summary."""
    return {
        "schema": 1,
        "verdict": _verdict(check),
        "model": check.model,
        "theirs": check.theirs,
        "bytes": check.bytes,
        "seen": check.seen,
        "values": check.values,
        "notes": list(check.notes),
        "tensors": [_as_json(tensor) for tensor in check.tensors],
    }


def _as_json(tensor: TensorCheck) -> dict[str, Any]:
    fields = as_dict(tensor)
    if fields["first"] is not None:  # JSON has no infinity
        fields["first"]["values"] = {k: v if isfinite(v) else str(v) for k, v in fields["first"]["values"].items()}
    return fields
