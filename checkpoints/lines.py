"""Records as JSON objects, in the format's order of keys: what every writer writes."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .points import parse
from .record import DECODE, PREFILL, Header, Rows, Token, statistic_as_json
from .structs import as_dict


def _as_text(value: float) -> float | str:
    """JSON has no non-finite numbers: they are written as strings (orjson would silently write null)."""
    if np.isfinite(value):
        return value
    return "NaN" if np.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _numbers(row: NDArray[np.float32], finite: bool) -> Any:
    """A row for a JSON writer that knows float32, and writes the shortest digits that read back as the same float32."""
    if finite:
        return row
    numbers: list[Any] = list(row)
    for kind, word in ((np.isnan(row), "NaN"), (row == np.inf, "Infinity"), (row == -np.inf, "-Infinity")):
        for i in np.flatnonzero(kind).tolist():
            numbers[i] = word
    return numbers


def _steps(row: NDArray[np.float64]) -> float | list[float]:
    """The steps of printed decimals: one number if all values have the same."""
    return float(row[0]) if (row == row[0]).all() else row.tolist()


def checkpoint_lines(rows: Rows) -> Iterable[dict[str, Any]]:
    """One JSON object a row, in the format's order of keys."""
    layer = parse(rows.point).layer
    width = np.arange(rows.values.shape[1])
    padding = width[None, :] >= rows.counts[:, None]
    finite: NDArray[np.bool_] = np.all(np.isfinite(rows.values) | padding, axis=1)
    for r in range(len(rows)):
        count = int(rows.counts[r])
        line: dict[str, Any] = {
            "type": "checkpoint",
            "checkpoint": rows.point,
            "layer": layer,
            "seq": int(rows.seq[r]),
            "token_idx": int(rows.token_idx[r]),
            "step": int(rows.step[r]),
            "phase": DECODE if rows.decode[r] else PREFILL,
            "dtype": rows.dtype,
            "shape": list(rows.shapes[r]),
            "values": _numbers(rows.values[r, :count], bool(finite[r])),
        }
        if rows.indices is not None and rows.indices[r, 0] >= 0:
            line["indices"] = rows.indices[r, :count].tolist()
        if rows.quantum is not None and rows.quantum[r, :count].any():
            line["quantum"] = _steps(rows.quantum[r, :count])
        stats = {name: column[r] for name, column in rows.stats.items() if not np.isnan(column[r])}
        if stats:
            line["stats"] = {name: _as_text(statistic_as_json(name, value)) for name, value in stats.items()}
        if rows.sketch is not None and not np.isnan(rows.sketch[r]).all():
            line["sketch"] = _numbers(rows.sketch[r], bool(np.isfinite(rows.sketch[r]).all()))
        yield line


def token_line(token: Token) -> dict[str, Any]:
    """One generated token as a JSON object."""
    return {
        "type": "token",
        "seq": token.seq,
        "token_idx": token.token_idx,
        "id": token.id,
        "text": token.text,
        "top": [[number, _as_text(value)] for number, value in token.top],
    }


def header_line(header: Header) -> dict[str, Any]:
    """The header as a JSON object; unknown fields are left out."""
    fields = {name: value for name, value in as_dict(header).items() if value not in (None, "", {}, ())}
    fields["model"] = {name: value for name, value in as_dict(header.model).items() if value not in (None, "")}
    return {"type": "header", "format": fields.pop("format"), **fields, "tokens": list(header.tokens)}


def end_line(checkpoints: int, tokens: int) -> dict[str, Any]:
    """The last line of a complete dump."""
    return {"type": "end", "checkpoints": checkpoints, "tokens": tokens}
