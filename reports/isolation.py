"""The result of isolating, as text and as JSON: a table of operations by layers, then a summary in words."""

import re
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from rich.text import Text

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Isolation, Operation
from checkpoints.points import KINDS
from checkpoints.structs import as_dict

from .as_json import SCHEMA, plain
from .layout import columns, labelled
from .numbers import clean, count, error, limit, ranges, token

_SIGN = {PROVEN: "✓", WRONG: "✗", NOT_OBSERVABLE: "·"}
_STYLE = {PROVEN: "", WRONG: "bold red", NOT_OBSERVABLE: "dim"}
_WRONG_SHOWN = 24
_ENCODERS_LAYER = re.compile(r"enc\.blk\.\d+\.")
_GRAFTS_SHOWN = 8


def lines(isolation: Isolation, width: int) -> Iterator[Text]:
    """The whole answer, for a terminal of `width` columns."""
    yield from labelled(list(_head(isolation)), width)
    yield Text("")
    groups = _groups(isolation.operations)
    yield from _table(groups, width)
    yield Text("")
    yield from labelled(list(_words(isolation)), width)
    yield from _elements(isolation, width)
    yield from _grafts(isolation, width)
    yield from labelled([("not checked", clean(reason)) for reason in isolation.not_checked], width)
    yield _answer(isolation)


def _head(isolation: Isolation) -> Iterator[tuple[str, str]]:
    yield "model", clean(isolation.model)
    passes = f", {isolation.passes} passes" if isolation.passes > 1 else ""
    cache = f", KV {isolation.kv_type}"
    yield "judged", clean(f"{isolation.judged} · {isolation.mode}{cache} · {count(isolation.positions, 'position')}{passes}")
    for name, value in isolation.facts.items():
        if value:
            yield name, clean(str(value))


def _groups(operations: Sequence[Operation]) -> dict[str, list[Operation]]:
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(_ENCODERS_LAYER.sub("enc.", operation.operation), []).append(operation)
    return groups


def _table(groups: dict[str, list[Operation]], width: int) -> list[Text]:
    rows: list[tuple[str, ...]] = [("operation", "proven", "worst NMSE", "layers")]
    styles = ["dim"]
    for name, group in groups.items():
        states = {operation.status for operation in group}
        if states == {NOT_OBSERVABLE}:  # said in words, with the reason
            continue
        proven = [operation.nmse for operation in group if operation.status == PROVEN and operation.nmse is not None]
        signs = "".join(_SIGN[operation.status] for operation in group)
        worst = error(max(proven)) if proven else "–"
        rows.append((name, f"{len(proven)}/{len(group)}", worst, signs))
        styles.append(_STYLE[WRONG if WRONG in states else NOT_OBSERVABLE if NOT_OBSERVABLE in states else PROVEN])
    return columns(rows, frozenset({1, 2}), styles, width)


def _words(isolation: Isolation) -> Iterator[tuple[str, str]]:
    alike = list(_alike(isolation.wrong))
    for group in alike[:_WRONG_SHOWN]:
        yield "wrong", _description(group)
    if further := sum(map(len, alike[_WRONG_SHOWN:])):
        yield "wrong", f"and {count(further, 'further operation')}: --format json lists them"
    for reason, items in _hidden(isolation).items():
        where = ", ".join(f"{kind}{_in_layers(layers)}" for kind, layers in items.items())
        yield "not observable", clean(f"{reason}: {where}")
    for finding in isolation.findings[:_WRONG_SHOWN]:
        yield "attention", clean(finding)


def _hidden(isolation: Isolation) -> dict[str, dict[str, list[int]]]:
    """Reason -> kind -> layers of what is not observable; the layer's number is left out of a reason."""
    reasons: dict[str, dict[str, list[int]]] = {}
    for item in isolation.operations:
        if item.status == NOT_OBSERVABLE:
            reason = re.sub(r"blk\.\d+\.", "blk.N.", item.reason)
            kind = _ENCODERS_LAYER.sub("enc.", item.operation)
            layers = reasons.setdefault(reason, {}).setdefault(kind, [])
            if item.layer is not None:
                layers.append(item.layer)
            elif kind != item.operation:
                layers.append(int(item.operation.split(".")[2]))
    return reasons


def _in_layers(layers: list[int]) -> str:
    return f" ({ranges(tuple(layers))})" if layers else ""


def _alike(items: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Operations of which the same is said in several layers, together."""
    groups: dict[tuple[str, str, str], list[Operation]] = {}
    for item in items:
        groups.setdefault((item.operation, item.weight, _of_any_layer(item.reason, item)), []).append(item)
    yield from groups.values()


def _of_any_layer(text: str, item: Operation) -> str:
    """What is said of an operation, without the number of its layer."""
    return text if item.layer is None else re.sub(rf"\bblk\.{item.layer}\.", "blk.N.", text)


def _description(items: Sequence[Operation]) -> str:
    item = max(items, key=lambda each: -inf if each.nmse is None else each.nmse)
    known = KINDS.get(item.operation)
    meaning = f", {known.meaning}" if known is not None else ""
    weight = f", {item.weight}" if item.weight and item.weight != "F32" else ""
    layers, several = ranges(tuple(each.layer for each in items if each.layer is not None)), len(items) > 1
    layer = f" of layer {item.layer}" if several else ""
    place = f", worst at position {item.position}{layer}" if item.position is not None else ""
    name, reason = (_of_any_layer(text, item) if several else text for text in (item.name, item.reason))
    if item.operation == "layer":
        name = f"layer{'s' if several else ''} {layers} as a whole"
    elif several:
        name = f"{name} in layers {layers}"
    reason = f": {reason}" if reason else ""
    return clean(f"{name} ({error(item.nmse)}{place}{meaning}{weight}){reason}")


def _elements(isolation: Isolation, width: int) -> list[Text]:
    if not isolation.elements:
        return []
    rows: list[tuple[str, ...]] = [("logit", "position", "theirs", "float64 dot", "error", "")]
    styles = ["dim"]
    for item in isolation.elements:
        mark = "" if item.right else "← another number"
        rows.append((str(item.row), str(item.position), f"{item.theirs:.7g}", f"{item.dot:.7g}", error(item.error), mark))
        styles.append("" if item.right else "bold red")
    return columns(rows, frozenset({0, 1, 2, 3, 4}), styles, width)


def _grafts(isolation: Isolation, width: int) -> Iterator[Text]:
    if not isolation.graft:
        return
    changed = [item for item in isolation.graft if item.changes]
    last = isolation.graft[-1]
    mean = sum(item.kl for item in isolation.graft) / len(isolation.graft)
    sentence = (
        f"llama.cpp, continuing from {clean(isolation.graft_from)} of this engine, chooses a different next token at {len(changed)} of "
        f"{count(len(isolation.graft), 'position')}; mean KL {error(mean)}, at the last position {error(last.kl)} "
        f"(margin {last.margin:.2g})"
    )
    yield from labelled([("graft", sentence)], width)
    for item in changed[:_GRAFTS_SHOWN]:
        where = f"position {item.position} {token(item.token)}: {item.own_choice} becomes {item.grafted_choice}"
        yield from labelled([("", f"{where} (KL {error(item.kl)}, margin {item.margin:.2g})")], width, label=7)


def _answer(isolation: Isolation) -> Text:
    proven = sum(item.status == PROVEN for item in isolation.operations)
    total = len(isolation.operations)
    floor = f", floor here {error(isolation.floor)}" if isolation.floor is not None else ""
    judged_by = f"limit {limit(isolation.limit)} ({isolation.limit_source}){floor}"
    hidden = sum(item.status == NOT_OBSERVABLE for item in isolation.operations)
    sentence = f"{proven} of {count(total, 'operation')} proven" + (f", {hidden} not observable" if hidden else "")
    if isolation:
        return Text(f"{'right' if not hidden else 'nothing wrong seen'}: {sentence}, {judged_by}", style="bold green")
    return Text(f"wrong: {_counted(isolation)}; {sentence}, {judged_by}", style="bold red")


def _counted(isolation: Isolation) -> str:
    elements = sum(not item.right for item in isolation.elements)
    parts = [count(len(isolation.wrong), "operation")] if isolation.wrong else []
    parts += [count(len(isolation.findings), "finding") + " in attention"] if isolation.findings else []
    parts += [count(elements, "logit")] if elements else []
    return ", ".join(parts)


def as_json(isolation: Isolation) -> dict[str, Any]:
    """One JSON object with `operations`, `wrong` and every other figure."""
    answer = {key: value for key, value in as_dict(isolation).items() if key not in ("operations", "graft", "elements")}
    fields = {
        "schema": SCHEMA,
        "verdict": "right" if isolation else "wrong",
        **{key: list(value) if isinstance(value, tuple) else value for key, value in answer.items()},
        "operations": [_operation(item) for item in isolation.operations],
        "wrong": [item.name for item in isolation.wrong],
        "elements": [as_dict(item) for item in isolation.elements],
        "graft": [as_dict(item) | {"changes": item.changes} for item in isolation.graft],
    }
    return {key: plain(value) for key, value in fields.items()}


def _operation(item: Operation) -> dict[str, Any]:
    return {"point": item.name, **as_dict(item)}
