"""Weights that a foreign engine dumped after loading, compared with the file: what was done to each of them."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.weights import DIFFERENT, EQUAL, NOT_CHECKED, FirstDifference, TensorCheck, WeightsCheck
from checkpoints.errors import DumpError
from engine.weights.gguf_model import GgufModel, TensorInfo, block_of
from reports.numbers import count

from .dumped_weights import OfFile, OfLines, load, other_numbers
from .held_values import CLOSE, said, unequal
from .mishaps import TRANSPOSED, mishaps
from .weights import Floats, first_values, type_name

_FEWEST = 4  # values without which nothing can be distinguished
_OTHERS = 64  # leading values by which another tensor is recognised


@np.errstate(over="ignore", invalid="ignore")  # of damaged values, which are different: that is the answer
def check_foreign(path: Path, theirs: Path) -> WeightsCheck:
    """Determine what each tensor that a foreign engine dumped is.

    Raises:
        DumpError: the file cannot be read, has too few values, or none of its names is a tensor of the model.
        ModelError: the model cannot be read.
    """
    model = GgufModel(path)
    heads = model.hyperparameters.n_heads, model.hyperparameters.n_kv_heads
    given = load(theirs)
    known = [name for name in given if name in model.tensors]
    if not known:
        names = ", ".join(list(given)[:3])
        raise DumpError(
            f"{theirs} names no tensor of the model ({names or 'nothing at all'}).",
            "Name them as the GGUF does: blk.0.attn_q.weight.",
            code="names",
        )
    leading: dict[str, Floats] = {}
    checks = [_tensor(model, model.tensors[name], given[name], heads, leading) for name in known]
    if isinstance(given, OfLines):
        checks = [_further(model, check, given.further[check.name], theirs) for check in checks]
    if all(check.status == NOT_CHECKED for check in checks):
        raise DumpError(
            f"{theirs} has fewer than {_FEWEST} values of each tensor, which decide nothing.",
            "Dump a hundred values of each at least.",
            code="theirs",
        )
    notes = []
    matrices = [check for check in checks if len(check.shape) == 2]
    if len(matrices) > 1 and all(check.status.startswith(TRANSPOSED) for check in matrices):
        checks = [replace(check, reason="", first=None) if check.status.startswith(TRANSPOSED) else check for check in checks]
        notes.append("every matrix is stored transposed: right if the products expect that")
    if stray := [name for name in given if name not in model.tensors]:
        notes.append(f"not in the model: {', '.join(stray[:5])}{' …' if len(stray) > 5 else ''}")
    if other := [*other_numbers(model.metadata, given.metadata)] if isinstance(given, OfFile) else []:
        notes.append(f"metadata that differ: {', '.join(other[:5])}{' …' if len(other) > 5 else ''}")
    longer = [
        f"{name} {len(given[name]):,} ({prod(model.tensors[name].shape):,})" for name in known if _longer(model, given, name)
    ]
    if longer:
        notes.append(
            f"more values than the model has, which were not compared: {', '.join(longer[:5])}{' …' * (len(longer) > 5)}"
        )
    if missing := len(model.tensors) - len(known):
        notes.append(f"not in {theirs.name} and not checked: {count(missing, 'tensor')} of the model")
    size = 4 * sum(check.elements for check in checks)
    return WeightsCheck(
        f"{model.hyperparameters.name or path.stem} ({path})", theirs.name, tuple(checks), size, tuple(notes), "2e-6"
    )


def _tensor(
    model: GgufModel, info: TensorInfo, values: Floats, heads: tuple[int, int], leading: dict[str, Floats]
) -> TensorCheck:
    kind, total = type_name(info.type), prod(info.shape)
    values = values[:total]
    if len(values) < min(_FEWEST, total) and np.isfinite(values).all():
        reason = f"{count(len(values), 'value')}: too few to decide"
        return TensorCheck(info.name, kind, info.shape, NOT_CHECKED, len(values), (), reason)
    right = first_values(model, info, len(values))
    if same(values, right):
        return TensorCheck(info.name, kind, info.shape, EQUAL, len(values))
    if narrow := _narrowed(values, right):
        return TensorCheck(info.name, kind, info.shape, f"equal as {narrow}", len(values))
    first = _first(values, right, info)
    for status, mishap in mishaps(model, info, len(values), heads):
        candidate = mishap()
        if candidate is None or len(candidate) < len(values):
            continue
        candidate = candidate[: len(values)]
        if same(values, candidate):
            return TensorCheck(info.name, kind, info.shape, status, len(values), (), status, first)
        if narrow := _narrowed(values, candidate):
            verdict = f"{status}, as {narrow}"
            return TensorCheck(info.name, kind, info.shape, verdict, len(values), (), verdict, first)
    if other := _another(model, info, values, leading):
        status = f"equal to another tensor: {other}"
        return TensorCheck(info.name, kind, info.shape, status, len(values), (), status, first)
    if verdict := _scaled(values, right):
        return TensorCheck(info.name, kind, info.shape, verdict, len(values), (), verdict, first)
    return TensorCheck(info.name, kind, info.shape, DIFFERENT, len(values), (), _said(values, right, info), first)


def _longer(model: GgufModel, given: Mapping[str, Floats], name: str) -> bool:
    return not isinstance(given, OfFile) and len(given[name]) > prod(model.tensors[name].shape)


def _further(model: GgufModel, check: TensorCheck, slices: list[tuple[int, Floats]], theirs: Path) -> TensorCheck:
    """A tensor whose leading values are the file's: so must its other slices be."""
    if not check.right or check.status == NOT_CHECKED:
        return check
    info, until = model.tensors[check.name], check.elements
    for start, values in slices:
        if not len(values) or start + len(values) > prod(info.shape):
            raise DumpError(
                f"{theirs}: {check.name} has no {count(len(values), 'value')} from element {start:,} on.",
                f"It has {prod(info.shape):,}.",
                code="theirs",
            )
        stop = start + len(values)
        check = replace(check, elements=check.elements + max(0, stop - max(start, until)))
        until = max(until, stop)
        right = first_values(model, info, len(values), skip=start)
        if not same(values, right) and not _narrowed(values, right):
            found = _first(values, right, info)
            at = found.element + start
            first = replace(found, element=at, block=at // block_of(info.type, info.name)[0])
            return replace(check, status=DIFFERENT, reason=_said(values, right, info, start), first=first)
    return check


def _said(values: Floats, right: Floats, info: TensorInfo, start: int = 0) -> str:
    return said(values, right, info.shape[-1], block_of(info.type, info.name)[0], start)


def same(loaded: Floats, right: Floats) -> bool:
    """Whether two slices are the same except for the last printed digits."""
    return not unequal(loaded, right).any()


def _narrowed(loaded: Floats, right: Floats) -> str:
    """F16 or BF16, if the values are those of the file rounded to it; else ""."""
    with np.errstate(over="ignore"):
        if same(loaded, right.astype(np.float16).astype(np.float32)):
            return "F16"
    bits = right.view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
    cut = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return "BF16" if same(loaded, nearest) or same(loaded, cut) else ""


def _scaled(loaded: Floats, right: Floats) -> str:
    """The constant factor by which all values are off, "" if there is none; values that were also rounded are recognised."""
    wide = right.astype(np.float64)
    energy = float(wide @ wide)
    factor = float(loaded.astype(np.float64) @ wide) / energy if energy > 0 else 0.0
    if not np.isfinite(factor) or factor == 0:
        return ""
    scaled = (wide * factor).astype(np.float32)
    if same(loaded, scaled):
        return f"scaled by a constant: {_short(factor)} times the file's values"
    # The factor was fitted to values that were rounded, or cut: simple numbers near it are tried, too.
    sign, near = np.sign(factor), abs(factor)
    plain = [float(f"{near:.{digits}g}") for digits in (4, 3, 2)]
    plain += [2.0 ** round(np.log2(near)), 1 / np.sqrt(max(round(1 / near**2), 1))]
    for number in [near, *plain]:
        if narrow := _narrowed(loaded, right * np.float32(sign * number)):
            return f"scaled by a constant: {_short(sign * number)} times the file's values, as {narrow}"
    return ""


def _short(value: float) -> str:
    """A number as text, also as the inverse of a root if it is one: "0.125 = 1/√64"."""
    root = round(1 / value**2) if value else 0
    text = f"{value:.6g}"
    return f"{text} = 1/√{root}" if 1 < root < 1 << 16 and abs(value * root**0.5 - 1) < CLOSE else text


def _first(values: Floats, right: Floats, info: TensorInfo) -> FirstDifference:
    at = int((~((values == right) | (np.isnan(values) & np.isnan(right)))).argmax())
    elements, _ = block_of(info.type, info.name)
    return FirstDifference(at, at // elements, "", {"theirs": float(values[at]), "file": float(right[at])})


def _another(model: GgufModel, info: TensorInfo, values: Floats, leading: dict[str, Floats]) -> str:
    """The name of another tensor that begins with these values."""
    if not leading:
        for name, other in model.tensors.items():
            leading[name] = first_values(model, other, min(_OTHERS, prod(other.shape)))
    count = min(len(values), _OTHERS)
    others: Mapping[str, Floats] = {name: other for name, other in leading.items() if name != info.name and len(other) >= count}
    return next((name for name, other in others.items() if same(values[:count], other[:count])), "")
