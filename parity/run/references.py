"""Other versions or builds of llama.cpp beside the reference: how far apart they are, and what that allows our side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.references import Moved, MovedPoint, References
from checkpoints.errors import ParityError
from checkpoints.points import parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump, Header
from reference.builds import Build
from reference.client import Reference
from reports.numbers import count

from ..diff.compare import Comparison, Options, comparison
from ..diff.limits import NATIVE, common_mode, limits
from ..diff.tolerances.truth import NO_ROUNDING
from .request import Progress, Prompt, Request
from .session import Outcome, comparison_options, following
from .sides import LlamaCpp

# A right engine is roughly as far from one reference as another reference is: ten times that distance is allowed. (A right
# float32 engine's usual limit is fifty times the measured noise.)
TIMES = 10.0


class Other(Struct, frozen=True):
    """Another llama.cpp, and the user's name for it."""

    build: Build
    label: str


def beside(
    outcome: Outcome,
    request: Request,
    others: Sequence[Other],
    judge: Callable[[Dump, Dump, Options], Comparison] = comparison,
    progress: Progress | None = None,
) -> tuple[Outcome, References]:
    """Run each other llama.cpp on the tokens and points of a run's reference, and judge our side by how much they differ.

    Returns:
        The outcome, judged again if the spread of the references raises a limit that our side exceeds; and the comparison of references.

    Raises:
        ParityError: another llama.cpp cannot be run, or has nothing in common with the reference; the message names it.
    """
    moved = []
    spread: dict[str, float] = {}
    header = outcome.ref.header
    for number, other in enumerate(others, 2):
        path = outcome.folder / f"ref-{number}.jsonl"
        try:
            _dump(other, outcome, request, path, progress)
            dump = read(path)
            compared = comparison(dump, outcome.ref, Options(placed=True))
        except ParityError as error:
            raise type(error)(f"{other.label}: {error.message}", error.advice, code=error.code) from error
        difference, points = _moved(compared, header, dump.header, other.label, set(outcome.ref.points) - set(dump.points))
        moved.append(difference)
        if difference.rounding:
            spread |= {name: max(spread.get(name, 0.0), value) for name, value in points.items()}
    return _judged(outcome, request, tuple(moved), spread, judge)


def _dump(other: Other, outcome: Outcome, request: Request, out: Path, progress: Progress | None) -> None:
    header = outcome.ref.header
    assert header is not None
    generated = tuple(token.id for token in outcome.ref.tokens)
    prompt = Prompt(header.prompt, header.tokens, header.pieces, generated=generated)
    with Reference(verbose=request.verbose, threads=request.threads, build=other.build) as reference:
        known = [name for name, _ in reference.describe(request.model).points]
        points = [name for name in following(request, outcome.ref, prompt, known).points.split(",") if name in known]
        followed = replace(following(request, outcome.ref, prompt, known), points=",".join(points), full=False, binary=False)
        LlamaCpp(followed, reference).dump(prompt, out, progress)


def name_of(header: Header | None, label: str = "") -> str:
    """The name of a llama.cpp, "llama.cpp 0.3.36", with `label` if one is given."""
    version = str((header.build if header is not None else {}).get("llama_cpp_python", ""))
    return " ".join(filter(None, ("llama.cpp", version, f"({label})" if label else "")))


def _moved(
    comparison: Comparison, base: Header | None, other: Header | None, label: str, missing: set[str]
) -> tuple[Moved, dict[str, float]]:
    """The table by kind of point, and the worst NMSE of each point."""
    records = comparison.records
    nmse = np.nan_to_num(records.measures.nmse, nan=np.inf)
    worst: dict[str, MovedPoint] = {}
    points: dict[str, float] = {}
    for number, name in enumerate(records.names):
        rows = np.flatnonzero(records.point == number)
        if not len(rows):
            continue
        at = int(rows[np.argmax(nmse[rows])])
        point = parse(name)
        kind = name if point.layer is None else f"blk.*.{point.kind}"
        points[name] = float(nmse[at])
        moved = MovedPoint(kind, len(rows), float(nmse[at]), point.layer, int(records.token_idx[at]))
        before = worst.get(kind)
        count = len(rows) + (before.records if before is not None else 0)
        worst[kind] = replace(moved if before is None or moved.nmse > before.nmse else before, records=count)
    table = tuple(worst.values())
    top = max(table, key=lambda point: point.nmse, default=None)
    native = common_mode(base, other) == NATIVE
    bound = limits(base, other).operations if native else NO_ROUNDING
    same = name_of(base) == name_of(other)
    return (
        Moved(
            name_of(base),
            name_of(other, label if same else ""),
            table,
            len(nmse),
            next((point for point in table if point.nmse > 0), None),
            top if top is not None and top.nmse > 0 else None,
            tuple(sorted(missing)),
            rounding=top is None or top.nmse <= bound,
            same_instructions=same and _instructions(base) == _instructions(other) != "",
        ),
        points,
    )


def _instructions(header: Header | None) -> str:
    """What a llama.cpp says it was compiled for: "CPU : SSE3 = 1 | AVX2 = 1 | …"."""
    return str((header.build if header is not None else {}).get("system", ""))


def _judged(
    outcome: Outcome,
    request: Request,
    moved: tuple[Moved, ...],
    spread: dict[str, float],
    judge: Callable[[Dump, Dump, Options], Comparison],
) -> tuple[Outcome, References]:
    """Judge our side once more if it exceeds a limit that the references exceed, or nearly so, among themselves."""
    usual = outcome.verdict.limits
    raised = {name: TIMES * value for name, value in spread.items() if TIMES * value > usual.at(name)}
    if outcome.verdict or not raised:
        return outcome, References(moved)
    points = {**usual.points, **raised}
    allowed = replace(
        usual, points=points, source=f"{usual.source}; {TIMES:g} times the difference between the references", assumed=False
    )
    judged = judge(outcome.ours, outcome.ref, replace(comparison_options(request), limits=allowed))
    notes = (f"the limit of {count(len(raised), 'point')} is {TIMES:g} times the difference between the references there",)
    verdict = replace(judged.verdict, notes=(*notes, *judged.verdict.notes))
    return replace(outcome, verdict=verdict, picture=judged.picture), References(moved, bool(verdict), TIMES)
