"""Rows of positions from values that have heads as a dimension of their own: [T, heads, n] looks like sequences [B, T, n], but is not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from checkpoints.points import OUTPUT_NORM, Kind, parse

_HEADS = {"H*d": "heads", "K*d": "kv_heads"}  # shape of a row -> the hyperparameter that counts its heads


class _Reading(NamedTuple):
    """One way to understand a value's dimensions: sequences, rows of each, heads (None: a row is one vector), values of a row."""

    words: str
    sequences: int
    rows: int
    heads: "int | None"
    width: int
    heads_first: bool = False

    @property
    def result(self) -> "tuple[int, int, int, bool]":
        """What it makes of the value: readings with the same one are the same."""
        return self.sequences, self.rows, self.width, self.heads_first and self.rows > 1 and self.heads != 1


def _readings(shape: "tuple[int, ...]") -> "list[_Reading]":
    if len(shape) == 2:
        rows, size = shape
        readings = [_Reading("[T, n]", 1, rows, None, size), _Reading("[heads, n]", 1, 1, rows, rows * size)]
    elif len(shape) == 3:
        a, b, size = shape
        readings = [
            _Reading("[B, T, n]", a, b, None, size),
            _Reading("[T, heads, n]", 1, a, b, b * size),
            _Reading("[heads, T, n]", 1, b, a, a * size, heads_first=True),
        ]
    else:
        sequences, a, b, size = shape
        readings = [
            _Reading("[B, T, heads, n]", sequences, a, b, b * size),
            _Reading("[B, heads, T, n]", sequences, b, a, a * size, heads_first=True),
        ]
    return readings


def _of_heads(known: "Kind | None") -> str:
    """The hyperparameter that counts the heads in a point's row; empty if it has none."""
    return _HEADS.get(known.row[0], "") if known is not None and len(known.row) == 1 else ""


class HeadRows:
    """Decides by what the model and the points say: how many heads there are and of which size, what other points of the same pass and
    of the same width had, how many tokens the prompt has.

    Args:
        hparams: "heads", "kv_heads" and "head_size" are used, where they are given.
        tokens: how many the prompt has; 0 if that is not known.
    """

    def __init__(self, hparams: "Mapping[str, Any] | None", tokens: int) -> None:
        self._sizes = {name: int(value) for name, value in (hparams or {}).items() if name in (*_HEADS.values(), "head_size")}
        self._tokens = tokens
        self._seen: dict[tuple[str, int], int] = {}  # how often a point of a sequence came
        self._pass: dict[
            int, tuple[str, tuple[int, int]]
        ] = {}  # sequence -> its last point without heads: sequences and their rows
        self._widths: dict[tuple[int | None, str], int] = {}
        self._words: dict[tuple[str, int], str] = {}  # what a kind's values were before, by their number of dimensions

    def of_model(self, config: Any) -> None:
        """Learn the sizes that a Hugging Face configuration states, unless they were given."""
        config = getattr(config, "text_config", config)
        heads = getattr(config, "num_attention_heads", None)
        width = getattr(config, "hidden_size", None)
        stated = {
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_size": getattr(config, "head_dim", None) or (width // heads if heads and width else None),
        }
        self._sizes = {name: value for name, value in stated.items() if isinstance(value, int)} | self._sizes

    def see(self, point: str, shape: "tuple[int, ...] | None", seq: int = 0) -> None:
        """Note every value, recorded or not, before `arranged`; `shape` is None if the value cannot be asked for it (DLPack alone)."""
        self._seen[point, seq] = self._seen.get((point, seq), 0) + 1
        known = parse(point).known
        if known is None or known.row not in (("D",), ("F",)) or known.name == OUTPUT_NORM:
            return  # the last norm and the logits may be those of the last position only
        if shape is None or len(shape) > 3:
            self._pass.pop(seq, None)
            return
        sequences, rows = (1, 1) if len(shape) < 2 else (1, shape[0]) if len(shape) == 2 else shape[:2]
        self._pass[seq] = point, (int(sequences), int(rows))

    def arranged(self, point: str, value: Any, positions: "int | None", seq: int = 0) -> Any:
        """The value as [T, n] or [B, T, n], if its point's rows are made of heads; else as it is.

        Args:
            value: an array that has `shape`, `reshape` and `swapaxes`.
            positions: how many were given for it.
            seq: the number of its (first) sequence.

        Raises:
            ValueError: nothing says which dimension the heads are, or none has as many rows as there are positions.
        """
        known, shape = parse(point).known, tuple(int(size) for size in value.shape)
        if known is None or not _of_heads(known) or len(shape) not in (2, 3, 4) or 0 in shape:
            return value
        reading = self._decided(point, known, shape, positions, seq)
        self._widths[parse(point).layer, known.lane or known.name] = reading.width
        self._words[known.name, len(shape)] = reading.words
        if reading.heads is None:
            return value
        return (value.swapaxes(-3, -2) if reading.heads_first else value).reshape(
            reading.sequences, reading.rows, reading.width
        )

    def _decided(self, point: str, known: Kind, shape: "tuple[int, ...]", positions: "int | None", seq: int) -> _Reading:
        left = _readings(shape)
        if positions is not None:
            rows = left[0].rows
            left = [reading for reading in left if reading.rows == positions]
            if not left:
                raise ValueError(f"{point}: {positions} positions for {rows} rows")
        for accepts in (
            lambda reading: self._is_of_pass(point, seq, reading),
            lambda reading: self._has_the_heads(point, known, reading),
            lambda reading: self._is_the_prompt(point, seq, reading),
            lambda reading: self._words.get((known.name, len(shape)), reading.words) == reading.words,
        ):
            left = [reading for reading in left if accepts(reading)] or left
            if len({reading.result for reading in left}) <= 1:
                return left[0]
        if len(shape) == 2:
            return left[0]
        ways = " or ".join(reading.words for reading in left)
        raise ValueError(
            f"{point}: nothing says whether {list(shape)} is {ways}; give the recorder "
            f'hparams={{"heads": …, "kv_heads": …, "head_size": …}}, or the value as rows [T, heads × n]'
        )

    def _is_of_pass(self, point: str, seq: int, reading: _Reading) -> bool:
        """Whether sequences and rows are those of the last point without heads, if that point belongs to the same pass."""
        other, size = self._pass.get(seq, ("", (0, 0)))
        return self._seen.get((other, seq)) != self._seen.get((point, seq)) or size == (reading.sequences, reading.rows)

    def _has_the_heads(self, point: str, known: Kind, reading: _Reading) -> bool:
        """Whether heads and width are those of the model, and of points of the same width before."""
        heads, size = self._sizes.get(_of_heads(known)), self._sizes.get("head_size")
        width = self._widths.get((parse(point).layer, known.lane or known.name), heads * size if heads and size else None)
        if width is not None and reading.width != width:
            return False
        return not heads or (reading.heads == heads if reading.heads is not None else reading.width % heads == 0)

    def _is_the_prompt(self, point: str, seq: int, reading: _Reading) -> bool:
        """Whether the first value of a point has as many rows as the prompt has tokens, if that is known."""
        known = self._tokens and seq == 0 and self._seen.get((point, seq)) == 1
        return not known or (reading.sequences, reading.rows) == (1, self._tokens)
