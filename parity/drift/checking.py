"""`parity drift check`: the other side against golden dumps, its differences, and a line in the ledger of margins."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints import formats
from checkpoints.answers.diff import Verdict
from checkpoints.answers.drift import Checked, Drift, Entry, Margin
from checkpoints.errors import InputError
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from reference.client import Reference
from reports.numbers import count

from ..diff.compare import Options, compare
from ..run.command import Command
from ..run.request import Progress, Request
from ..run.sides import EXEC
from . import ledger
from .dumps import GoldenDumps, dumped_by_workers
from .golden import Golden, GoldenPrompt, load, noted, now, read_prompts, rewrite

_NAMED = 3  # points that a note names


class Checking(Struct, frozen=True):
    """The request of `parity drift check`. A `side` of None is the recorded one; `dumps` are a foreign engine's own.

    `workers`: processes that run prompts, each with the model opened once; `cluster`: the address of a Dask scheduler instead.
    """

    folder: Path
    model: Path | None = None
    side: str | None = None
    command: Command | None = None
    dumps: tuple[Path, ...] = ()
    mode: str | None = None
    prompts: Path | None = None
    update: bool = False
    tolerance: float | None = None
    compute: str | None = None
    ledger: Path | None = None
    keep_ledger: bool = True
    threads: int | None = None
    backend: str = "auto"
    workers: int = 1
    cluster: str = ""


def _whole(golden: Golden, prompt: GoldenPrompt) -> Dump:
    """A prompt's golden dump.

    Raises:
        ParityError: it cannot be read, or is cut short. An engine may have printed no end record, ours and llama.cpp have one.
    """
    path = golden.path(prompt)
    dump = read(path)
    if dump.torn or (dump.end is None and golden.source != EXEC):
        raise InputError(f"the golden dump {path} is cut short.", "Restore it, or record again.", code="golden")
    return dump


def check(request: Checking, progress: Progress | None = None) -> Drift:
    """Run or read the other side, compare it, and note the result in the ledger.

    Raises:
        ParityError: the model, mode or prompt set is not the recorded one (which is not drift), or anything else is wrong.
    """
    golden = load(request.folder)
    golden.same_mode(request.mode)
    ledger.read(_book(request, golden))  # errors in it are reported before anything is computed
    if request.prompts is not None:
        golden.same_prompts(read_prompts(request.prompts))
    golden_dumps = [_whole(golden, prompt) for prompt in golden.prompts]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parity-drift-")))
        if request.dumps:
            paths: Sequence[Path] = _assigned(golden, request.dumps)
            source = "dumps"
        else:
            source = EXEC if request.command is not None else (request.side or golden.source)
            paths = list(_run_again(golden, source, request, scratch, progress))
        dumps = [formats.load(path) for path in paths]
        options = Options(tolerance=request.tolerance, compute=request.compute, strict=True)
        verdicts: list[Verdict] = []
        unrecorded: dict[str, None] = {}
        for prompt, checked, golden_dump in zip(golden.prompts, dumps, golden_dumps, strict=True):
            unrecorded |= dict.fromkeys(name for name in checked.points if name not in golden_dump.points)
            recorded = _recorded_points(checked, golden_dump)
            if prompt.lacking:
                recorded = _recorded_positions(recorded, golden_dump)
            verdicts.append(compare(recorded, golden_dump, options))
        updated: tuple[tuple[int, str], ...] = ()
        if request.update:
            updated = _update(golden, source, verdicts, paths, dumps)
    return _answer(request, golden, source, dumps, verdicts, updated, tuple(unrecorded))


def _recorded_points(checked: Dump, golden_dump: Dump) -> Dump:
    """The dump without points that its golden dump lacks, since an engine may print more. The whole dump if they have no point in
    common."""
    points = {name: rows for name, rows in checked.points.items() if name in golden_dump.points}
    return replace(checked, points=points) if points else checked


def _recorded_positions(checked: Dump, golden_dump: Dump) -> Dump:
    """The dump without positions that its golden dump lacks because the recorded engine stopped there; it may have been fixed since."""
    recorded = {name: golden_dump.points[name].token_idx for name in checked.points if name in golden_dump.points}
    points = {name: checked.points[name].take(np.isin(checked.points[name].token_idx, at)) for name, at in recorded.items()}
    return replace(checked, points=points) if any(map(len, points.values())) else checked


def _book(request: Checking, golden: Golden) -> Path:
    return request.ledger or golden.folder / ledger.NAME


def _answer(
    request: Checking,
    golden: Golden,
    source: str,
    dumps: Sequence[Dump],
    verdicts: Sequence[Verdict],
    updated: tuple[tuple[int, str], ...],
    unrecorded: tuple[str, ...],
) -> Drift:
    book = _book(request, golden)
    entries, skipped = ledger.read(book)
    identity = golden.identity
    earlier = ledger.comparable(entries, source, identity)
    versions = ledger.versions(dumps[0].header)
    before = earlier[-1].versions if earlier else {}
    if golden.source == source:
        before = ledger.versions(read(golden.path(golden.prompts[0])).header)
    points = tuple(replace(point, before=ledger.best(earlier, point.checkpoint)) for point in _margins(verdicts))
    moved = ledger.changes(before, versions)
    answer = Drift(
        golden=_described(golden),
        side=_side(source, versions),
        checked=tuple(Checked(prompt.text, verdict) for prompt, verdict in zip(golden.prompts, verdicts, strict=True)),
        points=points,
        changes=moved,
        findings=tuple(ledger.findings(points)),
        updated=updated,
        notes=tuple(_notes(skipped, book, unrecorded, golden)),
    )
    if request.keep_ledger and not updated:
        commit, dirty = ledger.commit()
        figures = {point.checkpoint: (point.nmse, point.limit, point.of_limit) for point in points}
        extra = {"dirty": dirty, "mode": golden.mode, "model": golden.fingerprint}
        ledger.append(book, Entry(now(), commit, answer.verdict, source, identity, versions, figures, extra))
    return answer


def _notes(skipped: int, book: Path, unrecorded: Sequence[str], golden: Golden) -> Iterator[str]:
    if skipped:
        yield ledger.skipped_note(skipped, book)
    if unrecorded:
        yield f"not compared, since the golden dumps lack them: {listed_points(unrecorded)}"
    for prompt in golden.prompts:
        if prompt.lacking:
            yield f"{prompt.file} was recorded as far as the engine went ({prompt.lacking}): the rest is not checked"


def listed_points(names: Sequence[str]) -> str:
    """The first three of some points, and how many more there are."""
    more = f" and {count(len(names) - _NAMED, 'more point')}" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _side(source: str, versions: dict[str, str]) -> str:
    version = versions.get("version") or versions.get("llama_cpp_python") or ""
    named = f"{versions.get('source', source)} {version}".strip()
    threads = f"{versions['threads']} threads" if "threads" in versions else ""
    return " · ".join(filter(None, [named, versions.get("device") or versions.get("backend", ""), threads]))


def _described(golden: Golden) -> str:
    made_by = {"ref": "llama.cpp", "ours": "our engine", "exec": "an external engine"}[golden.source]
    version = golden.build.get("llama_cpp_python") or golden.build.get("version") or ""
    many = f"{len(golden.prompts)} prompt{'s' * (len(golden.prompts) > 1)}"
    return " · ".join([str(golden.folder), many, f"{made_by} {version}".strip(), golden.model_name, f"{golden.mode} mode"])


def _margins(verdicts: Sequence[Verdict]) -> list[Margin]:
    """The worst record of each point over all prompts, in dataflow order."""
    worst: dict[str, Margin] = {}
    for number, verdict in enumerate(verdicts):
        for point in verdict.points:
            record = point.worst
            margin = Margin(point.checkpoint, record.nmse or 0.0, record.limit, record.of_limit, number, record.token_idx)
            if point.checkpoint not in worst or margin.of_limit > worst[point.checkpoint].of_limit:
                worst[point.checkpoint] = margin
    return list(worst.values())


def _update(
    golden: Golden, source: str, verdicts: Sequence[Verdict], paths: Sequence[Path], dumps: Sequence[Dump]
) -> tuple[tuple[int, str], ...]:
    """Rewrite the golden records of the points that left their limits."""
    if source != golden.source:
        raise InputError(
            f"--update would put another side's numbers ({source}) into golden dumps of {golden.source}.",
            "Repair the engine, or record the golden dumps again.",
            code="update",
        )
    updated: list[tuple[int, str]] = []
    for number, (prompt, verdict, path) in enumerate(zip(golden.prompts, verdicts, paths, strict=True)):
        if any(lacks.records for lacks in (verdict.missing_ours, verdict.missing_ref)) or not verdict.points:
            raise InputError(
                f"prompt {number} has other tokens or records than its golden dump: --update rewrites numbers only.",
                "Record the set again.",
                code="update",
            )
        wrong = [point.checkpoint for point in verdict.points if point.failed]
        if wrong:
            rewrite(golden, prompt, path, wrong)
            updated += [(number, name) for name in wrong]
    if updated:
        header = dumps[0].header
        noted(golden, tuple(updated), dict(header.build) if header else {}).save()
    return tuple(updated)


def _run_again(golden: Golden, source: str, request: Checking, scratch: Path, progress: Progress | None) -> Iterator[Path]:
    run = Request(
        model=golden.model_path(request.model),
        command=request.command,
        mode=golden.mode,
        points=golden.points,
        slice_size=golden.slice_size,
        backend=request.backend,
        threads=request.threads,
    )
    if request.cluster or request.workers > 1:
        finished = dumped_by_workers(source, run, golden.prompts, request.workers, request.cluster)
        for done, (kept, dump) in enumerate(finished, 1):
            (scratch / kept.file).write_bytes(dump)
            if progress is not None:
                progress(source, done, len(golden.prompts))
        yield from (scratch / kept.file for kept in golden.prompts)
        return
    with Reference(threads=request.threads) as reference:
        dumps = GoldenDumps(source, run, reference)
        for number, kept in enumerate(golden.prompts):
            dumps.write_again(kept, scratch / kept.file)
            if progress is not None:
                progress(source, number + 1, len(golden.prompts))
            yield scratch / kept.file


def _assigned(golden: Golden, dumps: Sequence[Path]) -> list[Path]:
    """The given dumps in the order of their prompts: by token ids if they list them, else in the given order."""
    if len(dumps) != len(golden.prompts):
        raise InputError(
            f"there are {count(len(golden.prompts), 'golden prompt')}, but {count(len(dumps), 'dump')}.",
            "Give one dump for each prompt.",
            code="prompts-changed",
        )
    headers = [formats.load(path).header for path in dumps]
    by_tokens = {header.tokens: path for header, path in zip(headers, dumps, strict=True) if header and header.tokens}
    if len(by_tokens) < len(dumps):
        return list(dumps)
    assigned: list[Path] = []
    for prompt in golden.prompts:
        path = by_tokens.get(prompt.tokens) or by_tokens.get((*prompt.tokens, *prompt.generated))
        if path is None:
            return list(dumps)  # the comparison says where the tokens diverge
        assigned.append(path)
    return assigned
