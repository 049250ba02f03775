"""A base file: each prediction of one side as its K largest logits and the logarithm of the sum of all."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.errors import InputError
from checkpoints.whole_file import put

from .measures import Listed, largest, log_sum
from .text import Chunk

KEPT = 256  # logits a position: 2 KB, where a row of 151,936 has 594 KB
_FORMAT = 1
_ROUNDING = 1e-3  # of float32 logits in a sum: no logit is larger than the logarithm of the sum over all


class Base(Struct, frozen=True):
    """The predictions of one side over a text.

    Attributes:
        name: who made them.
        tokens: int64 [N], the chunks' ids one after the other; `context` of them a chunk.
        ids: int32 [P, K], logits: float32 [P, K], largest first; log_sums: float64 [P]; next_logits: float32 [P], of the text's own token.
    """

    name: str
    context: int
    tokens: NDArray[np.int64]
    ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    log_sums: NDArray[np.float64]
    next_logits: NDArray[np.float32]

    def check(self, chunks: Sequence[Chunk], vocabulary: int, path: Path) -> None:
        """Raises InputError if it was made from other tokens, has ids beyond the vocabulary's, or fewer predictions than the text."""
        given = np.array([token for chunk in chunks for token in chunk.tokens], dtype=np.int64)
        known = not self.ids.size or (self.ids.min() >= 0 and self.ids.max() < vocabulary)
        enough = sum(len(chunk.scored) for chunk in chunks) <= len(self.ids)
        if not (known and enough) or len(given) > len(self.tokens) or not np.array_equal(given, self.tokens[: len(given)]):
            raise InputError(
                f"{path} was made with another text, tokenizer or --context.", "Make it again with --save-base.", code="base"
            )

    def rows(self, chunk: Chunk, before: int) -> Generator[tuple[int, Listed], None, None]:
        """(position, what is kept of its prediction) of a chunk's scored positions; `before`: how many earlier chunks have."""
        for number, position in enumerate(chunk.scored, before):
            total = float(self.log_sums[number])
            own = chunk.tokens[position + 1], float(self.next_logits[number]) - total
            yield position, Listed(self.ids[number].astype(np.int64), self.logits[number].astype(np.float64) - total, own)


class BaseWriter:
    """Collects a base, position after position."""

    def __init__(self, name: str, context: int, kept: int = KEPT) -> None:
        self._name, self._context, self._kept = name, context, kept
        self._tokens: list[int] = []
        self._ids: list[NDArray[np.int32]] = []
        self._logits: list[NDArray[np.float32]] = []
        self._log_sums: list[float] = []
        self._next: list[float] = []

    def chunk(self, chunk: Chunk) -> None:
        """A chunk begins."""
        self._tokens += chunk.tokens

    def add(self, row: NDArray[np.float32], following: int) -> None:
        """One prediction [V]; `following` is the text's own next token."""
        top = largest(row, self._kept)
        self._ids.append(top.astype(np.int32))
        self._logits.append(row[top].astype(np.float32))
        self._log_sums.append(log_sum(row))
        self._next.append(float(row[following]))

    def save(self, path: Path) -> None:
        """Write it.

        Raises:
            InputError: it cannot be written.
        """
        from safetensors.numpy import save

        arrays: dict[str, NDArray[Any]] = {
            "tokens": np.array(self._tokens, dtype=np.int64),
            "ids": np.stack(self._ids),
            "logits": np.stack(self._logits),
            "log_sums": np.array(self._log_sums),
            "next_logits": np.array(self._next, dtype=np.float32),
        }
        put(path, save(arrays, {"format": str(_FORMAT), "name": self._name, "context": str(self._context)}))


def load(path: Path) -> Base:
    """Read a base file.

    Raises:
        InputError: it cannot be read, or is not a base file.
    """
    try:
        facts, arrays = _read(path)
        base = Base(facts["name"], int(facts["context"]), **arrays)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.", "Check --base.", code="base") from error
    except Exception as error:  # safetensors has errors of its own
        raise InputError(f"{path} is not a base file of this version.", "Make it with --save-base.", code="base") from error
    if not _is_whole(base):
        raise InputError(f"{path} is damaged: its arrays do not match.", "Make it again with --save-base.", code="base")
    return base


def _is_whole(base: Base) -> bool:
    """Whether the arrays are of the types, the shapes and the numbers that `BaseWriter` writes."""
    kinds = {"tokens": "<i8", "ids": "<i4", "logits": "<f4", "log_sums": "<f8", "next_logits": "<f4"}
    if any(getattr(base, name).dtype != kind for name, kind in kinds.items()) or base.tokens.ndim != 1 or base.ids.ndim != 2:
        return False
    count, kept = base.ids.shape
    if not kept or base.logits.shape != (count, kept) or not base.log_sums.shape == base.next_logits.shape == (count,):
        return False
    if not np.isfinite(base.log_sums).all():
        return False
    most = np.maximum(base.logits.max(axis=1, initial=-np.inf), base.next_logits)  # NaN stays NaN
    return bool((most <= base.log_sums + _ROUNDING).all())


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        facts = file.metadata() or {}
        if facts.get("format") != str(_FORMAT):
            raise ValueError("another format")
        return facts, {name: file.get_tensor(name) for name in ("tokens", "ids", "logits", "log_sums", "next_logits")}
