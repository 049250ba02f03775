"""Weights that a foreign engine dumped after loading them: safetensors, npz, or JSON lines; or those of another GGUF file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import DumpError, ModelError
from checkpoints.formats.arrays import safetensors, unpacked_size
from checkpoints.given_json import decoded
from checkpoints.reading.parallel import LINE
from checkpoints.regular import require_regular
from engine.weights.gguf_model import GgufModel

from .weights import Floats

_GGUF = b"GGUF"  # how such a file begins
_USE = 'Use safetensors, npz, a GGUF file, or JSONL: {"name": "blk.0.attn_q.weight", "values": [...]}.'


class OfFile(Mapping[str, Floats]):
    """The tensors of a GGUF file, dequantised when they are asked for: all at once may be more than the memory holds."""

    def __init__(self, path: Path) -> None:
        self._model = GgufModel(path)
        self.metadata = self._model.metadata

    def __getitem__(self, name: str) -> Floats:
        return self._model.load(name).reshape(-1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.tensors)

    def __len__(self) -> int:
        return len(self._model.tensors)


class OfLines(dict[str, Floats]):
    """The leading values of tensors, and `further` slices: the element at which each begins, and its values."""

    def __init__(self) -> None:
        super().__init__()
        self.further: dict[str, list[tuple[int, Floats]]] = {}


def other_numbers(model: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """The numbers by which an engine would compute two files differently, each with both values; names and tokenizers are none of these."""
    for key in {**model, **theirs}:
        values = [f"{of[key]:g}" if isinstance(of.get(key), float) else str(of.get(key, "missing")) for of in (theirs, model)]
        if not key.startswith(("general.", "tokenizer.")) and values[0] != values[1]:
            yield f"{key} {values[0]} (the model's: {values[1]})"


def load(path: Path) -> Mapping[str, Floats]:
    """Flat float32 values by tensor name from safetensors, npz, JSONL records (`checkpoint` or `name`, and `values`), or GGUF.

    Records of JSONL may say the element at which their values begin (`start`, else 0): the result is `OfLines` then.

    Raises:
        DumpError: the file is none of these, or has no tensors.
        ModelError: the GGUF file cannot be read.
    """
    try:
        require_regular(path, DumpError)
        with path.open("rb") as file:
            if file.read(len(_GGUF)) == _GGUF:
                return OfFile(path)
        if path.suffix == ".safetensors":
            weights = dict(safetensors(path, integers=True))
        elif path.suffix == ".npz":
            unpacked_size(path)
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # np.load leaves a damaged file open
                weights = {name: archive[name] for name in archive.files}
        else:
            return _given(path, _of_lines(path))
        flat = {name: _numbers(path, name, values).astype(np.float32).reshape(-1) for name, values in weights.items()}
    except (DumpError, ModelError):
        raise
    except OSError as error:
        raise DumpError(
            f"cannot read the weights of {path}: {error.strerror or error}.", "Check the path.", code="theirs"
        ) from error
    except Exception as error:  # each library has its own errors for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise DumpError(
            f"cannot read the weights of {path}: {reason}.",
            _USE,
            code="theirs",
        ) from error
    return _given(path, flat)


def _given(path: Path, flat: Mapping[str, Floats]) -> Mapping[str, Floats]:
    if not flat:
        raise DumpError(f"{path} holds no tensors.", _USE, code="theirs")
    return flat


def _of_lines(path: Path) -> OfLines:
    slices: dict[str, dict[int, Floats]] = {}
    for name, start, values in _jsonl(path):
        slices.setdefault(name, {})[start] = values.astype(np.float32).reshape(-1)
    given = OfLines()
    for name, of in slices.items():
        if 0 not in of:
            raise DumpError(f"{path} lacks the leading values of {name}.", "Dump those from element 0 on, too.", code="theirs")
        given[name] = of.pop(0)
        given.further[name] = sorted(of.items())
    return given


def _numbers(path: Path, name: str, values: Any) -> NDArray[Any]:
    """The values of a tensor; those of a list in float64, where "NaN" and "Infinity" may stand as text."""
    try:
        numbers = np.array(values, dtype=np.float64) if isinstance(values, list) else np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        numbers = np.array("")
    if numbers.dtype.kind in "USOcMm":
        raise DumpError(
            f"{path}: the values of {name} are not all numbers.", "Dump each tensor as one flat list.", code="theirs"
        )
    return numbers


def _jsonl(path: Path) -> Iterator[tuple[str, int, NDArray[Any]]]:
    seen: dict[tuple[str, int], NDArray[Any]] = {}
    with path.open("rb") as file:
        while line := file.readline(LINE):
            if len(line) == LINE:
                raise DumpError(
                    f"{path} has a line of more than {LINE >> 20} MiB.",
                    "The leading values of each tensor suffice.",
                    code="theirs",
                )
            try:  # unlike orjson, Python's parser takes NaN, and numbers that are infinite in float64
                record = decoded(line[max(line.find(b"{"), 0) :].decode())
            except ValueError:
                continue
            name = (record.get("checkpoint") or record.get("name")) if isinstance(record, dict) else None
            if isinstance(name, str) and isinstance(record.get("values"), list):
                values, start = _numbers(path, name, record["values"]), record.get("start", 0)
                if type(start) is not int or start < 0:
                    raise DumpError(
                        f"{path}: the start of {name} is no element's number.", "Count elements from 0.", code="theirs"
                    )
                if not np.array_equal(seen.setdefault((name, start), values), values, equal_nan=True):
                    raise DumpError(f"{path} has {name} twice, with other values.", "Dump each tensor once.", code="theirs")
                yield name, start, values
