"""Guesses what a tensor is if it does not equal its source: another tensor, or its source in another order, transposed, scaled, or all
zeros."""

import numpy as np

from .conversion_compare import CHUNK, Change, HeldTensor
from .conversion_sources import TensorSource
from .row_distance import Distance, Limit

TURNED = "transposed: llama.cpp expects a row for each output"
MATRICES_TURNED = "each of its matrices is transposed: llama.cpp expects a row for each output"

RESHAPED = "reshaped where it should be transposed: its values are in the order of the folder's"


def guess(held: HeldTensor, source: TensorSource, right: Change, limit: Limit) -> str:
    """What the values are as a whole, in words; "" if no guess gives them."""
    columns, turned = held.info.shape[-1], source.turned()
    if all(part.array.ndim == 2 for part in turned.parts):
        if limit.holds(held.distance(turned, right)):
            return TURNED if len(turned.parts) == 1 else MATRICES_TURNED
        if all(part.array.flags.c_contiguous and part.array.size % columns == 0 for part in turned.parts):
            reshaped = TensorSource(tuple(part.view(part.array.reshape(-1, columns)) for part in turned.parts))
            if limit.holds(held.distance(reshaped, right)):
                return RESHAPED
    if other := _other(held, source, right, limit):
        return f"it is exchanged: its values are in {other}"
    return _scaled(held, source, right, limit)


def first_wrong_row(held: HeldTensor, source: TensorSource, right: Change, limit: Limit, at: int) -> str:
    """Which of the right rows stands in the place of a wrong one, in words; "" if it is none. Of three dimensions, which matrix."""
    values = held.row(at)
    if not values.any():
        return f"row {at:,} is zero"
    for start, rows in source.portions(held.info.shape[-1], CHUNK, held.unit):
        wanted = right(rows)
        distance = Distance.of(len(wanted), wanted.shape[1])
        distance.put(0, np.broadcast_to(values, wanted.shape), wanted)
        allowed = limit.row * distance.energies + limit.element * distance.columns
        if (same := np.flatnonzero(distance.errors <= allowed)).size and wanted.shape[1] > 1:
            return _as_words(held.info.shape, at, start + int(same[0]))
    return ""


def _as_words(shape: tuple[int, ...], at: int, of: int) -> str:
    if len(shape) == 3 and at % shape[1] == of % shape[1]:
        return f"its matrix {at // shape[1]} is the folder's matrix {of // shape[1]}"
    return f"row {at:,} has the values that belong in row {of:,}"


def _other(held: HeldTensor, source: TensorSource, right: Change, limit: Limit) -> str:
    """The GGUF tensor of its layer, or of its kind in another one, that has the source's values; "" if there is none."""
    info, tensors = held.info, held.model.tensors
    layer, kind = info.name.rsplit(".", 2)[0], info.name.split(".", 2)[-1]
    for name, other in tensors.items():
        related = name.startswith(f"{layer}.") or (info.name.startswith("blk.") and name.split(".", 2)[-1] == kind)
        if name == info.name or other.shape != info.shape or not related:
            continue
        candidate = HeldTensor(held.model, other, held.unit)
        for _, values, wanted in candidate.beside(source, right):
            begins = Distance.of(len(values), values.shape[1])  # before the whole is compared
            begins.put(0, values, wanted)
            if limit.holds(begins) and limit.holds(candidate.distance(source, right)):
                return name
            break
    return ""


def _scaled(held: HeldTensor, source: TensorSource, right: Change, limit: Limit) -> str:
    """Whether one factor gives all values, or they are all zero."""
    product = energy = 0.0
    zero = True
    for _, values, wanted in held.beside(source, right):
        product += float(np.vdot(wanted.astype(np.float64), values))
        energy += float(np.vdot(wanted.astype(np.float64), wanted))
        zero = zero and not values.any()  # NaN is not zero
    if energy and zero:
        return "all zero"
    factor = np.float32(product / energy) if energy and np.isfinite(product) else np.float32(0)
    # Where the type keeps float32 the factor itself is known to float32's rounding only.
    loose = Limit(max(limit.whole, 1e-12), max(limit.row, 1e-12), limit.element)
    if factor and loose.holds(held.distance(source, lambda rows: right(rows) * factor)):
        return f"{factor:.6g} × the folder's values"
    return ""
