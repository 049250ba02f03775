"""Every weight dequantised by us, by libggml and by gguf-py, byte for byte; a few rows at a time, whatever the file's size."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.weights import DIFFERENT, EQUAL, NOT_CHECKED, FirstDifference, TensorCheck, WeightsCheck
from checkpoints.errors import ModelError
from checkpoints.printable import first_names
from engine.backend import Backend, choose
from engine.weights.dequantize import FORMATS, dequantize
from engine.weights.gguf_model import GgufModel, TensorInfo, block_of
from reference.to_float import ToFloat

OURS, LIBGGML, GGUF = "ours", "libggml", "gguf"
PORTION = 1 << 22  # elements at a time: 16 MiB for each of the three results, and what gguf-py needs besides

Progress = Callable[[str, int, int], None]  # (what, done, total)
Floats = NDArray[np.float32]


def check_weights(
    path: Path, backend: str = "auto", progress: Progress | None = None, *, portion: int = PORTION
) -> WeightsCheck:
    """Dequantise every tensor three times, `portion` elements at a time, and compare the results, tolerance 0.

    Raises:
        ModelError: the file cannot be read as a model; InputError: no such backend.
    """
    model, side, by_libggml = GgufModel(path), choose(backend), ToFloat()
    total = sum(info.n_bytes for info in model.tensors.values())
    done = 0
    checks: list[TensorCheck] = []
    for info in model.tensors.values():

        def advanced(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if progress is not None:
                progress("weights", done, total)

        checks.append(_tensor(model, info, side, by_libggml, portion, advanced))
    nonfinite = [check.name for check in checks if check.nonfinite]
    damaged = f"the file itself contains NaN or infinities: {first_names(nonfinite)}"
    notes = (f"ours on {side.device}", *((damaged,) if nonfinite else ()))
    return WeightsCheck(f"{model.hyperparameters.name or path.stem} ({path})", "", tuple(checks), total, notes)


def type_name(kind: int) -> str:
    """gguf-py's name of a ggml type."""
    from gguf import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(kind).name)
    except ValueError:
        return f"type {kind}"


def _tensor(
    model: GgufModel, info: TensorInfo, side: Backend, by_libggml: ToFloat, portion: int, advanced: Callable[[int], None]
) -> TensorCheck:
    raw = model.raw(info.name)
    columns, rows = info.shape[-1], len(raw)
    step = max(1, portion // columns)
    by: tuple[str, ...] = ()
    nonfinite = 0
    name = type_name(info.type)
    for start in range(0, rows, step):
        part = raw[start : start + step]
        results = _results(part, info, columns, side, by_libggml)
        by = tuple(results)
        if len(by) < 2:
            return TensorCheck(
                info.name,
                name,
                info.shape,
                NOT_CHECKED,
                0,
                by,
                f"only {by[0]} reads {name}" if by else f"nothing here reads {name}",
            )
        if (first := _first_difference(results, part, info, start * columns)) is not None:
            return TensorCheck(info.name, name, info.shape, DIFFERENT, rows * columns, by, _blame(first), first)
        nonfinite += int(np.count_nonzero(~np.isfinite(results[by[0]])))
        advanced(part.size)
    return TensorCheck(info.name, name, info.shape, EQUAL, rows * columns, by, nonfinite=nonfinite)


def _results(part: NDArray[np.uint8], info: TensorInfo, columns: int, side: Backend, by_libggml: ToFloat) -> dict[str, Floats]:
    """The values of some rows, flat, from each of the three implementations that can read this type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as by_gguf

    results: dict[str, Floats] = {}
    if info.type in FORMATS:  # our other formats use gguf-py, which would be compared with itself
        results[OURS] = side.to_host(dequantize(side.array(part), info.type, columns)).reshape(-1)
    if (values := by_libggml(part, info.type, len(part) * columns)) is not None:
        results[LIBGGML] = values
    try:
        with np.errstate(all="ignore"):
            results[GGUF] = np.asarray(by_gguf(part, GGMLQuantizationType(info.type)), dtype=np.float32).reshape(-1)
    except (NotImplementedError, ValueError):
        pass  # gguf-py cannot dequantise this type
    return results


def _first_difference(
    dequantised: Mapping[str, Floats], part: NDArray[np.uint8], info: TensorInfo, offset: int
) -> FirstDifference | None:
    """The first element whose bits are not the same in all results; all NaNs count as equal."""
    results = list(dequantised.values())
    different = np.zeros(len(results[0]), dtype=np.bool_)
    for other in results[1:]:
        different |= (results[0].view(np.uint32) != other.view(np.uint32)) & ~(np.isnan(results[0]) & np.isnan(other))
    if not different.any():
        return None
    at = int(different.argmax())
    elements, size = block_of(info.type, info.name)
    block = at // elements
    raw = part.reshape(-1)[block * size : (block + 1) * size]
    return FirstDifference(
        offset + at,
        offset // elements + block,
        bytes(raw).hex(),
        {name: float(values[at]) for name, values in dequantised.items()},
    )


def _blame(first: FirstDifference) -> str:
    """Which implementation disagrees with the others."""
    values = first.values
    for name, value in values.items():
        others = [other for other_name, other in values.items() if other_name != name]
        if len(others) > 1 and len(set(map(repr, others))) == 1 and repr(others[0]) != repr(value):
            return f"{name} stands alone"
    return "all differ" if len(values) > 2 else "the two differ"


def first_values(model: GgufModel, info: TensorInfo, count: int, skip: int = 0) -> Floats:
    """Elements skip … skip + count − 1 of a tensor, row-major; only their rows are dequantised.

    Raises:
        ModelError: gguf-py does not know the type.
    """
    columns = info.shape[-1]
    start, stop = skip // columns, min(-(-(skip + count) // columns), len(model.raw(info.name)))
    rows = dequantize(model.raw(info.name)[start:stop], info.type, columns)
    flat: Floats = rows.reshape(-1)[skip - start * columns :][:count]
    if not len(flat):
        raise ModelError(f"{info.name} has no element {skip}.")
    return flat
