"""The whole matrix, in this process, in several, or on a cluster. Finished cells are kept however the run ends."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from functools import cache
from time import perf_counter

from msgspec import Struct

from checkpoints.answers.conform import CHANGED, CRASHED, Cell, CellResult, Conformance
from checkpoints.errors import InputError

from ..run.workers import workers_of
from . import identity, results
from .bench import Bench, Settings, key_of
from .history import noted

Progress = Callable[[CellResult, int, int], None]  # a result, the number of results so far, the total
_ATTEMPTS = 3  # at a part whose worker dies; after that the part itself is taken as the reason


class ConformRequest(Struct, frozen=True):
    """The request of `parity conform`.

    `workers`: processes, each with its own llama.cpp. `cluster`: the address of a Dask scheduler, whose workers run the cells.
    """

    settings: Settings
    cells: tuple[Cell, ...]
    workers: int = 1
    cluster: str = ""


def conform(request: ConformRequest, progress: Progress = lambda *_: None) -> Conformance:
    """Run all cells; after an interruption the answer has the cells finished until then.

    Raises:
        InputError: there are no cells, or the folder cannot be written.
    """
    if not request.cells:
        raise InputError("the matrix has no cell.", "Widen --architectures, --types, --prompts or --modes.", code="matrix")
    began = perf_counter()
    done: dict[Cell, CellResult] = {}
    with results.alone(request.settings.folder):
        try:
            for result in _results(request):
                done[result.cell] = result
                progress(result, len(done), len(request.cells))
        except KeyboardInterrupt:
            pass  # the missing cells are listed in `not_run`
    conformance = Conformance(
        side=request.settings.side,
        results=tuple(done[cell] for cell in request.cells if cell in done),
        not_run=tuple(cell for cell in request.cells if cell not in done),
        seconds=perf_counter() - began,
        workers=request.workers,
        folder=str(request.settings.folder),
    )
    if not conformance.not_run:
        noted(conformance, request.settings, datetime.now(UTC).isoformat(timespec="seconds"))
    return conformance


def _results(request: ConformRequest) -> Iterator[CellResult]:
    settings, rest = request.settings, []
    engine = identity.of_side(settings.run.command, settings.hugging_face)
    for cell in request.cells:
        kept = results.load(settings.folder, cell, key_of(settings, engine, cell))
        if kept is None:
            rest.append(cell)
        else:
            yield kept
    parts = parts_of(rest)
    if request.cluster or (request.workers > 1 and len(parts) > 1):
        yield from _by_workers(request, parts)
    elif parts:
        with Bench(settings) as bench:
            yield from (bench.run(cell) for part in parts for cell in part)


def _by_workers(request: ConformRequest, parts: list[list[Cell]]) -> Iterator[CellResult]:
    """Results in the order in which parts end. A part whose worker is killed runs again."""
    for _ in range(_ATTEMPTS):
        try:
            for result in _attempt(request, parts):
                if request.cluster and result.key != CHANGED:  # its workers may have a disk of their own
                    results.save(request.settings.folder, result)
                yield result
        except BrokenProcessPool:
            continue
        return
    yield from (CellResult(cell, CRASHED, "the worker process died three times") for part in parts for cell in part)


def _attempt(request: ConformRequest, parts: list[list[Cell]]) -> Iterator[CellResult]:
    """Results of parts, each of which is taken out of the list when it has ended."""
    with workers_of(min(request.workers, len(parts)), request.cluster) as pool:
        pending = {pool.submit(run_part, request.settings, part): part for part in parts}
        for finished in as_completed(pending):
            part_results = finished.result()
            parts.remove(pending[finished])
            yield from part_results


def parts_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The parts that workers are given: cells of one architecture, which share models."""
    parts: dict[str, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(cell.architecture, []).append(cell)
    return list(parts.values())


def run_part(settings: Settings, cells: Sequence[Cell]) -> list[CellResult]:
    """Run some cells in this process, with the llama.cpp that it keeps for such settings."""
    bench = _bench(settings)
    try:
        return [bench.run(cell) for cell in cells]
    finally:
        bench.idle()


@cache
def _bench(settings: Settings) -> Bench:
    """A worker process keeps its bench between parts: llama.cpp is started once."""
    return Bench(settings)
