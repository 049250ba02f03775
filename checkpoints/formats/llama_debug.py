"""What llama.cpp's `llama-debug --save-logits` writes (and the scripts of its model-conversion folder, in the same format).

`llamacpp-NAME.bin` holds the logits of the last token, `llamacpp-NAME-embeddings.bin` embeddings, both float32; beside them are
`-tokens.bin` (int32) and `-prompt.txt`.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import Mapping
from ..points import LOGITS, OUTPUT_NORM
from ..record import Dump, Header, Rows
from ..regular import read_text, require_regular
from ..summary import summarise

_NAME = re.compile(r"(llamacpp|pytorch)-.+\.bin")
_TOKENS, _EMBEDDINGS = "-tokens.bin", "-embeddings.bin"
_LARGEST = 1 << 30  # bytes: embeddings of 16,384 floats at 16,384 positions
_POOLED = "result_embd_pooled"
_UNIT = 1e-3  # how far the norm of a pooled embedding, which is normalised, may differ from 1
_AGAIN = "Run llama-debug --save-logits again."


def detect(path: Path) -> bool:
    """One of its .bin files by name, or a folder that has some."""
    if path.is_dir():
        return any(_NAME.fullmatch(file.name) for file in path.iterdir())
    return bool(_NAME.fullmatch(path.name))


def read(path: Path, mapping: Mapping) -> Dump:
    """The logits of the last token, or the embeddings.

    Raises:
        DumpError: there is none, there are several, or a file does not match the others.
    """
    file = _of_values(path)
    stem = file.name.removesuffix(".bin").removesuffix("-embeddings")
    values = _numbers(file, "<f4").astype(np.float32)
    embeddings = file.name.endswith(_EMBEDDINGS)
    beside = next((place for place in _beside(file, stem, _TOKENS) if place.exists()), None)
    tokens = tuple(int(n) for n in _numbers(beside, "<i4")) if beside is not None else ()
    prompt = next((place for place in _beside(file, stem, "-prompt.txt") if place.exists()), None)
    last = max(len(tokens), 1) - 1
    name, rows, positions = LOGITS, values[None], np.array([last])
    if embeddings:
        pooled = abs(float(np.linalg.norm(values.astype(np.float64))) - 1) < _UNIT
        if pooled or len(values) % (last + 1):
            name = _POOLED
        else:
            name, rows, positions = OUTPUT_NORM, values.reshape(last + 1, -1), np.arange(last + 1)
    point, entry = mapping.entry(name)
    with np.errstate(over="ignore"):
        summary: Rows = summarise(point, mapped(mapping, entry, rows), positions.astype(np.int64), slice_size=None)
    text = _prompt(prompt) if prompt is not None else None
    header = Header(file.name.partition("-")[0], tokens=tokens, prompt=text, slice=rows.shape[1]) if tokens else None
    notes = () if tokens else (f"there is no {stem}{_TOKENS}: the position is assumed to be 0 (--offset changes it)",)
    return Dump(str(path), header, {point: summary}, notes=notes)


def _beside(file: Path, stem: str, ending: str) -> list[Path]:
    return [file.with_name(f"{stem}{kind}{ending}") for kind in (("-embeddings", "") if "embeddings" in file.name else ("",))]


def _of_values(path: Path) -> Path:
    if not path.is_dir():
        if path.name.endswith(_TOKENS):
            raise DumpError(f"{path} holds token ids.", f"Name the file beside it without {_TOKENS[:-4]}.", code="no-records")
        return path
    files = sorted(file for file in path.iterdir() if _NAME.fullmatch(file.name) and not file.name.endswith(_TOKENS))
    if not files:
        raise DumpError(f"{path} holds token ids and no file of values.", _AGAIN, code="no-file")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise DumpError(f"{path} holds {len(files)} files of values: {names}.", "Name one of them.", code="no-file")
    return files[0]


def _numbers(file: Path, kind: str) -> NDArray[np.generic]:
    require_regular(file, DumpError)
    try:
        size = file.stat().st_size
        if size > _LARGEST:
            raise DumpError(f"{file} holds more than 1 GiB.", _AGAIN, code="array")
        data = file.read_bytes()
    except OSError as error:
        raise DumpError(f"cannot read {file}: {error.strerror}.", "Check the path.", code="no-file") from error
    if not data or len(data) % 4:
        raise DumpError(f"{file} has {len(data):,} bytes, which is not a whole number of 32-bit values.", _AGAIN, code="array")
    values = np.frombuffer(data, kind)
    if kind == "<i4" and (values < 0).any():
        raise DumpError(f"{file} has a token id below 0.", _AGAIN, code="tokens")
    if kind == "<f4" and (wrong := np.isnan(values)).any():  # of any kind: NumPy warns of signalling ones
        values = np.where(wrong, np.float32(np.nan), values)
    return values


def _prompt(file: Path) -> str | None:
    try:
        match = re.search(r"\Aprompt: (.*?)\nn_tokens: \d+\n", read_text(file), re.DOTALL)
    except (OSError, UnicodeDecodeError):
        return None
    return match[1] if match else None
