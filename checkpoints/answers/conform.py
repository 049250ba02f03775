"""What a conformance run found: one result a cell of the matrix, and the causes that cells share. Data that travels and is kept."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct, convert

from ..structs import as_dict

PARITY = "parity"
LOWER = "parity at "  # + "F16", "BF16"
DIVERGENCE = "divergence"
REFUSED = "refused"
CRASHED = "crashed"
TIMED_OUT = "timed out"
UNUSABLE = "unusable"  # a dump that cannot be read or believed, or has no logits
UNDECIDED = "undecided"  # the noise of its arithmetic is as large as the model's values
NO_REFERENCE = "no reference"  # llama.cpp itself has no such model, or cannot run it
CHANGED = "changed"  # the key of a result of which nobody knows by which build of the engine it was made
WRONG = (DIVERGENCE, CRASHED, TIMED_OUT, UNUSABLE)


_Measured = Annotated[float, Meta(ge=0)]  # a number, which NaN in a damaged file is not


class Cell(Struct, frozen=True):
    """One cell of the matrix: a tiny model of an architecture and a weight type, a prompt, and how it is fed."""

    architecture: str
    type: str
    prompt: str
    mode: str

    @property
    def name(self) -> str:
        """The cell's name in sentences and file names."""
        return f"{self.architecture} {self.type} {self.prompt} {self.mode}"


class CellResult(Struct, frozen=True):
    """The result of one cell.

    Attributes:
        verdict: PARITY, LOWER + an arithmetic, DIVERGENCE, REFUSED, CRASHED, TIMED_OUT, UNUSABLE, UNDECIDED or NO_REFERENCE.
        reason: the side's own words if the verdict is neither parity nor divergence.
        checkpoint, token_idx: the first divergence.
        cause: a short explanation, identical for cells that share a cause: a fault's name and place, or the operation.
        sentence: the cause in a sentence.
        nmse, of_limit: of the record closest to its limit, or farthest beyond it; `worst` names that record.
        rope: which elements RoPE rotates in the cell's model, where it was compared: "NORM", "NEOX", …
        key: identifies engine, model, prompt and program: a cell whose key is unchanged need not run again. Or CHANGED.
        report: path of its report, relative to the run's folder; "" if there is none.
        kept: whether the result was taken from an earlier run.
    """

    cell: Cell
    verdict: str
    reason: str = ""
    checkpoint: str = ""
    token_idx: int = -1
    cause: str = ""
    sentence: str = ""
    compared: int = 0
    nmse: _Measured | None = None
    of_limit: _Measured | None = None
    worst: str = ""
    rope: str = ""
    seconds: float = 0.0
    key: str = ""
    report: str = ""
    kept: bool = False

    @property
    def wrong(self) -> bool:
        """Whether the cell failed; a refusal does not count as a failure."""
        return self.verdict in WRONG

    def as_dict(self) -> dict[str, Any]:
        """The cell's and the result's fields in one flat dictionary, for JSON and tables."""
        own = {name: value for name, value in as_dict(self).items() if name != "cell"}
        return as_dict(self.cell) | own

    @staticmethod
    def from_dict(facts: dict[str, Any]) -> "CellResult":
        """Read a result back from such a dictionary.

        Raises:
            KeyError, TypeError, ValueError: it was written by another version, or is damaged.
        """
        cell = {name: facts[name] for name in Cell.__struct_fields__}
        own = {name: facts[name] for name in CellResult.__struct_fields__ if name != "cell"}
        return convert({"cell": cell, **own}, CellResult)


class SharedCause(Struct, frozen=True):
    """Cells that fail in the same way."""

    cause: str
    sentence: str
    cells: tuple[Cell, ...]


class Conformance(Struct, frozen=True):
    """The whole matrix; true if nothing is wrong.

    Attributes:
        side: a description of the engine under test.
        not_run: cells that were not run because of an interruption.
    """

    side: str
    results: tuple[CellResult, ...]
    not_run: tuple[Cell, ...] = ()
    seconds: float = 0.0
    workers: int = 1
    folder: str = ""

    def __bool__(self) -> bool:
        return not any(result.wrong for result in self.results)

    @property
    def kept(self) -> int:
        """How many results were taken from an earlier run."""
        return sum(result.kept for result in self.results)

    @property
    def unkept(self) -> int:
        """How many results will not be taken over, because a file of the engine changed during the run."""
        return sum(result.key == CHANGED for result in self.results)

    @property
    def counts(self) -> Counter[str]:
        """How many cells each verdict has."""
        return Counter(result.verdict for result in self.results)

    @property
    def causes(self) -> tuple[SharedCause, ...]:
        """What the failing cells have in common, the most frequent first."""
        groups: dict[str, list[CellResult]] = {}
        for result in self.results:
            if result.wrong:
                groups.setdefault(result.cause or f"{result.verdict}: {result.reason.rstrip('.')}", []).append(result)
        ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
        return tuple(SharedCause(name, of[0].sentence, tuple(result.cell for result in of)) for name, of in ranked)


def axis(results: Sequence[CellResult], name: str) -> list[str]:
    """The values of one axis of the matrix in the order in which they occur."""
    return list(dict.fromkeys(str(getattr(result.cell, name)) for result in results))
