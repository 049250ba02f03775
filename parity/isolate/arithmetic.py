"""The arithmetic in which a foreign engine computes, if it does not say: its products with weights show it together.
Every engine is judged in float32 first. A lower arithmetic is granted only if products are off everywhere, and only as far as they are
off.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import Limits
from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Operation
from checkpoints.record import Header, ModelInfo
from engine.replay.kept import CACHE, KEPT
from engine.replay.wide import coarse_points
from reports.sentences import ARITHMETIC, kept_in

from ..diff.limits import TABLE, limits
from .bench import IsolationBench
from .judging import Record

# One operation of a right engine in F16, BF16 or TF32 (products rounded, all values rounded, or sums in F16; 29 models of all types)
# was at most 4 times as far off as the median product with weights, scores 12 times; twice that, in round numbers.
SPREAD = 25.0
_SOURCE = f"lower arithmetic: {SPREAD:g} times what the median product is off"
_FEWEST = 3  # products that are off: fewer do not show an arithmetic
_REASON = (
    "its error has the size of F16 or BF16 arithmetic, and too few products were recorded whole to tell (--compute f32 judges exactly, "
    "--compute f16 or bf16 allows for it)"
)
_MIXED = "while others are in float32: mixed precision, which nothing states (--compute {} allows for it everywhere)"
# Factors rounded to eight bits show in most products; floating point may be that of single ones.
_KINDS = ("f16", "bf16", "tf32", *KEPT)
_CACHES = tuple(name for name, what in KEPT.items() if what.part == CACHE)
_EIGHT_BITS = "q8"
_TYPES = {"F16": "f16", "BF16": "bf16", "TF32": "tf32"}
_F16 = limits(None, Header(source="", model=ModelInfo(), compute="f32"), compute="f16").operations
_MOST = limits(None, None, compute="bf16").operations  # of the lowest arithmetic in floating point


class Judgement(Struct, frozen=True):
    """Operations judged by a limit.

    `source` says where the limit is from; `of_layers` is that of a whole layer beside llama.cpp's.
    `scaled` are the wrong operations that are the right value times a factor. `cache` is the type in which the engine keeps keys and
    values, if the operations show it and nothing states it.
    """

    bench: IsolationBench
    operations: list[Operation]
    passes: int
    limit: float
    source: str = ""
    of_layers: float = 0.0
    scaled: frozenset[str] = frozenset()
    cache: str = ""


class Judge(Protocol):
    """Judges the operations of a dump."""

    def __call__(self, limit: float, lower: Sequence[str] = (), *, open_cache: bool = False) -> Judgement:
        """Judge by a limit, NMSE; products may also compute in one of these lower arithmetics, and a cache may be F16 (`open_cache`)."""


def in_its_arithmetic(judged_at: Judge, allowed: Limits, exact: float, source: str, *, open_cache: bool = False) -> Judgement:
    """The operations, judged in float32, or in the lower arithmetic that their products show.

    If they do not show any, wrong ones that lower arithmetic may explain are not observable.

    Args:
        judged_at: judges them. allowed: the limits of the arithmetic that is stated, else of the lowest that is granted.
        exact, source: the limit of one operation in float32, and where it is from.
        open_cache: nothing states the type of the cache, which need not be that of the arithmetic.
    """
    most = allowed.operations
    if most > _MOST and not allowed.assumed:  # eight bits are stated: which products agree shows nothing
        return replace(judged_at(most), source=allowed.source, of_layers=most)
    judgement = in_float32 = judged_at(exact)
    bench = judgement.bench
    shown = exact if most <= exact else shown_limit(judgement.operations, bench.products, bench.rounding, exact, most)
    if shown == exact and (allowed.assumed or most <= exact):
        if allowed.assumed and (mixed := _mixed(judgement, judged_at, exact)) is not None:
            return replace(mixed, source=source, of_layers=most)
        if open_cache and not allowed.assumed and (kept := _by_cache(judgement, judged_at, exact)) is not None:
            judgement = kept
        of_layers = max(exact, TABLE) if coarse_points(bench.steps) else exact
        return replace(judgement, source=source, of_layers=of_layers)
    if shown is None and allowed.assumed:
        undecided = replace(
            judgement, operations=_undecided(judgement.operations, most), limit=most, source=allowed.source, of_layers=most
        )
        if any(operation.status == WRONG and operation.name in bench.products for operation in undecided.operations):
            undecided = _spared(undecided, _in_lower(in_float32, judged_at(exact, (_EIGHT_BITS,))))
        return undecided
    if shown is None or shown == exact:  # an arithmetic that is stated may be that of single operations
        return replace(judged_at(most), source=allowed.source, of_layers=most)
    kinds = (*_KINDS, _EIGHT_BITS) if allowed.assumed else _KINDS
    judgement = replace(judged_at(shown), source=allowed.source if shown == most else _SOURCE, of_layers=most)
    return _held_to_rounding(judgement, in_float32, judged_at(exact, kinds))


def shown_limit(
    operations: Sequence[Operation], products: Collection[str], rounding: Mapping[str, float], exact: float, most: float
) -> float | None:
    """The limit of one operation in the arithmetic that the operations show: `exact` for float32; None if they do not show any.

    Args:
        operations: judged in float32. products: the names of products with weights. rounding: of those that round their
            activations as ggml does, what that costs: NMSE.
        exact, most: the limits of one operation in float32 and in the lowest arithmetic that is granted.
    """
    judged = [operation for operation in operations if operation.nmse is not None and operation.name in products]
    # What rounds activations to 8 bits as ggml does is right, and says nothing about attention; what rounds them to F16 or BF16 computes
    # in that type. Products with weights of other types may round in another way.
    eight_bits = {operation.weight for operation in judged if operation.name in rounding} - {"F16", "BF16"}
    others = [operation for operation in judged if operation.weight not in eight_bits]
    errors = np.array([rounding.get(operation.name, operation.nmse) for operation in others], dtype=np.float64)
    off = errors[errors > exact]
    wrong = [operation for operation in operations if operation.status == WRONG]
    if wrong and 2 * (len(judged) - len(others)) >= len(judged) and all(operation in others for operation in wrong):
        return None  # most products round to 8 bits, and those with other weights may do so, too
    if wrong and not len(errors) and not any(operation.name in products for operation in wrong):
        return None  # norms and attention compute in a type that no product shows
    if not wrong or 2 * len(off) < max(len(errors), 1):
        return exact
    return min(most, SPREAD * float(np.median(off))) if len(off) >= _FEWEST else None


def _undecided(operations: Sequence[Operation], most: float) -> list[Operation]:
    """The operations; wrong ones that lower arithmetic may explain are not observable."""
    return [
        replace(operation, status=NOT_OBSERVABLE, reason=_REASON)
        if operation.status == WRONG and operation.nmse is not None and operation.nmse <= most
        else operation
        for operation in operations
    ]


def _mixed(judgement: Judgement, judged_at: Judge, exact: float) -> Judgement | None:
    """The judgement of an engine some of whose operations are those of a lower arithmetic; None if no wrong operation is.

    Those are neither wrong, since nothing states another arithmetic, nor proven to be what the mode asks for.
    """
    if not any(operation.status == WRONG for operation in judgement.operations):
        return None
    again = judged_at(exact, _KINDS)
    reasons = _in_lower(judgement, again)
    return without_blame(again, reasons) if reasons else None


def _by_cache(judgement: Judgement, judged_at: Judge, exact: float) -> Judgement | None:
    """The judgement of an engine that states float32 and not the type of its cache, if some of what reads a cache is wrong and right where
    the cache keeps a lower type; else None.
    """
    wrong = {operation.name for operation in judgement.operations if operation.status == WRONG}
    if not wrong:
        return None
    again = judged_at(exact, _CACHES, open_cache=True)
    kinds: dict[str, str] = {}
    for operation in again.operations:
        record = again.bench.records.get(operation.name)
        if operation.name in wrong and operation.status == PROVEN and record is not None:
            # What is right without one of these arithmetics is so by ggml's product with a cache of F16.
            kinds[operation.name] = KEPT[next(iter(record.arithmetics))].type if record.arithmetics else "f16"
    if not kinds:
        return None
    reasons = {name: f"right where {kept_in(CACHE, kind)}" for name, kind in kinds.items()}
    return replace(without_blame(again, reasons), cache=next(iter(kinds.values())))


def without_blame(judgement: Judgement, reasons: Mapping[str, str]) -> Judgement:
    """The judgement with these operations not observable, each for its reason."""
    operations = [
        replace(operation, status=NOT_OBSERVABLE, reason=reasons[operation.name]) if operation.name in reasons else operation
        for operation in judgement.operations
    ]
    judgement.bench.attention.settle((), reasons)
    return replace(judgement, operations=operations)


def _held_to_rounding(judgement: Judgement, in_float32: Judgement, again: Judgement) -> Judgement:
    """The judgement of an engine in lower arithmetic, if most of its products are what our own rounding gives (`again`): an operation
    that is its right value times a factor even then is wrong, however small the error is beside rounding's. Where that rounding is to eight
    bits, whose errors differ more from product to product, what it explains is not wrong.
    """
    products, records = again.bench.products, again.bench.records
    off = {operation.name for operation in in_float32.operations if operation.status == WRONG and operation.name in products}
    reasons = _in_lower(in_float32, again)
    if 2 * len(off & reasons.keys()) < len(off):
        return judgement
    scaled = {
        operation.name: operation
        for operation in again.operations
        if operation.status == WRONG and (record := records.get(operation.name)) is not None and record.wrong and record.scaled
    }
    operations = [scaled.get(operation.name, operation) for operation in judgement.operations]
    judgement = replace(judgement, operations=operations, scaled=frozenset(scaled))
    eight_bits = {name: reason for name, reason in reasons.items() if _EIGHT_BITS in records[name].arithmetics}
    return judgement if 2 * len(off & eight_bits.keys()) < len(off) else _spared(judgement, eight_bits)


def _spared(judgement: Judgement, reasons: Mapping[str, str]) -> Judgement:
    """The judgement without blame for operations that a lower arithmetic explains, each with its reason."""
    operations = [
        replace(operation, status=NOT_OBSERVABLE, reason=reasons[operation.name])
        if operation.status == WRONG and operation.name in reasons
        else operation
        for operation in judgement.operations
    ]
    return replace(judgement, operations=operations)


def _in_lower(judgement: Judgement, again: Judgement) -> dict[str, str]:
    """The wrong operations of a judgement in float32 that are right in a lower arithmetic (`again`), each with what is to be said of it."""
    wrong = {operation.name for operation in judgement.operations if operation.status == WRONG}
    records, products = again.bench.records, again.bench.products
    return {
        operation.name: reason
        for operation in again.operations
        if operation.name in wrong
        and operation.name in records
        and (reason := _rounding_of(operation, records[operation.name], operation.name in products))
    }


def _rounding_of(operation: Operation, record: Record, multiplies: bool) -> str:
    """A sentence on an operation that is right in a lower arithmetic and wrong in float32; empty for any other."""
    if operation.status == PROVEN and record.arithmetics:
        kind = next(iter(record.arithmetics))
        if kind in KEPT:
            return f"right where {kept_in(KEPT[kind].part, KEPT[kind].type)}"
        return f"right as {ARITHMETIC[kind]} arithmetic rounds it, {_MIXED.format(kind)}"
    if record.lower and not record.wrong:
        return f"the right value rounded to {record.lower}, {_MIXED.format(_TYPES[record.lower])}"
    if record.wrong and record.within:
        named = ARITHMETIC[record.within]
        return f"off by no more than {named} costs what was not recorded before it, {_MIXED.format(record.within)}"
    if multiplies and record.wrong and record.scattered and record.nmse <= _F16:
        return f"off by noise of the size that sums in F16 make, {_MIXED.format('f16')}"
    return ""
