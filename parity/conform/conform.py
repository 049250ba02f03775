"""The whole matrix, in this process or in several, resumable: what is finished is kept, whatever ends the run."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from time import perf_counter

from checkpoints.answers.conform import Cell, CellResult, Conformance
from checkpoints.errors import InputError

from .bench import Bench, Settings

Progress = Callable[[CellResult, int, int], None]  # a result, how many there are now, of how many


@dataclass(frozen=True)
class ConformRequest:
    """What `parity conform` was asked for. `workers`: processes, each with a llama.cpp of its own."""

    settings: Settings
    cells: tuple[Cell, ...]
    workers: int = 1


def conform(request: ConformRequest, progress: Progress = lambda *_: None) -> Conformance:
    """Run all cells; an interruption gives what there is until then.

    Raises:
        InputError: there is no cell, or the folder cannot be written.
    """
    if not request.cells:
        raise InputError("the matrix has no cell.", "Widen --architectures, --types, --prompts or --modes.", code="matrix")
    began = perf_counter()
    done: dict[Cell, CellResult] = {}
    try:
        for result in _results(request):
            done[result.cell] = result
            progress(result, len(done), len(request.cells))
    except KeyboardInterrupt:
        pass  # what is missing is in `not_run`
    command = request.settings.run.command
    return Conformance(
        side=command.line if command is not None else "our engine",
        results=tuple(done[cell] for cell in request.cells if cell in done),
        not_run=tuple(cell for cell in request.cells if cell not in done),
        seconds=perf_counter() - began,
        workers=request.workers,
        folder=str(request.settings.folder),
    )


def _results(request: ConformRequest) -> Iterator[CellResult]:
    parts = parts_of(request.cells)
    if request.workers == 1:
        with Bench(request.settings) as bench:
            for part in parts:
                yield from (bench.run(cell) for cell in part)
        return
    with _processes(request.workers) as pool:
        for finished in as_completed([pool.submit(partial(run_part, request.settings), part) for part in parts]):
            yield from finished.result()


@contextmanager
def _processes(count: int) -> Iterator[Executor]:
    """Worker processes; what has not begun when the block is left early does not begin."""
    # Ctrl-C reaches all processes of a terminal: this one ends the others.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def parts_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """What one worker takes at once: the cells of one architecture, which share models."""
    parts: dict[str, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(cell.architecture, []).append(cell)
    return list(parts.values())


def run_part(settings: Settings, cells: Sequence[Cell]) -> list[CellResult]:
    """Run some cells in this process, with the llama.cpp that it has for such settings."""
    bench = _bench(settings)
    return [bench.run(cell) for cell in cells]


@cache
def _bench(settings: Settings) -> Bench:
    """A worker process keeps its bench from part to part: llama.cpp is started once."""
    return Bench(settings)
