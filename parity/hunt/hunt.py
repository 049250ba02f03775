"""A foreign engine is run again, each time with the points that the last comparison asks for, until the operation has a name."""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.diff import DIVERGENCE, Verdict
from checkpoints.answers.explain import Explanation
from checkpoints.answers.hunt import Hunt, Round
from checkpoints.errors import DumpError, InputError, ParityError
from checkpoints.formats import load
from checkpoints.jsonl import write
from checkpoints.points import expand
from checkpoints.record import Dump, Header, Rows
from reference.client import Reference

from ..diff.compare import Comparison
from ..diff.measured.tokens import TOKENS
from ..explain.case import ExplainOptions
from ..explain.input import explain_dump
from ..explain.on_model import compared_on
from ..lint.lint import refuse_unusable
from ..run.command import POINTS, Command
from ..run.completeness import held_to
from ..run.request import Progress, Prompt, Request
from ..run.results import dumps_of
from ..run.session import OURS_FILE, REF_FILE, Outcome, comparison_options, following, resolve_prompt, run_folder
from ..run.sides import ExternalEngine, LlamaCpp

_FOR_TOKENS = 10.0  # seconds to look for a fault of the tokens: few are tried, the rest of a search would be about operations
_NO_RECORDS = (
    "empty",
    "no-records",
)  # codes of a dump without a record: an engine that has none of the points that it was asked for
MOST_ROUNDS = 8  # layer outputs halve nothing: two or three runs lead from five places to one operation, a few more where slices are small


class RoundReport(Struct, frozen=True):
    """What is known after a round, for display: the round, and both sides' dumps."""

    round: Round
    ours: Dump
    ref: Dump


class Hunted(Struct, frozen=True):
    """The answer, and the last comparison with its dumps and folder."""

    hunt: Hunt
    outcome: Outcome


def hunt(
    request: Request,
    progress: Progress | None = None,
    started: Reference | None = None,
    report_round: Callable[[RoundReport], None] = lambda _: None,
) -> Hunted:
    """Run the engine until the operation has a name, then look for the cause.

    Raises:
        InputError: there is no foreign engine, or tokens are to be generated; ParityError: as `parity run`.
    """
    if request.command is None:
        raise InputError("--hunt needs an engine of yours.", "Give its command with --exec.", code="exec")
    began = perf_counter()
    with started or Reference(verbose=request.verbose, threads=request.threads) as reference, run_folder(request) as folder:
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
        rounds: list[Round] = []
        with dumps_of(folder) as dumps:
            chase = _Chase(request, request.command, reference, prompt, (dumps, folder), progress)
            for step in chase.rounds():
                rounds.append(step.round)
                report_round(step)
    result = chase.result
    explanation, unexplained, own = (None, "", False)
    if result.verdict.verdict == DIVERGENCE:  # there is nothing to explain about what did not come
        if progress is not None:
            progress("looking for the cause", 0, None)
        explanation, unexplained, own = _explained(request, prompt, chase.ours, result.verdict)
    answer = Hunt(
        tuple(rounds),
        explanation,
        unexplained,
        chase.stopped,
        perf_counter() - began,
        tuple(dict.fromkeys(chase.notes)),
        own_tokens=own,
    )
    outcome = Outcome(folder, chase.ours, chase.ref, result.verdict, result.picture, answer.seconds)
    return Hunted(answer, outcome)


class _Chase:
    """The rounds of one hunt: what was recorded so far, and why it ends."""

    def __init__(
        self,
        request: Request,
        command: Command,
        reference: Reference,
        prompt: Prompt,
        folders: tuple[Path, Path],
        progress: Progress | None,
    ) -> None:
        self._request, self._command, self._reference = request, command, reference
        self._prompt, self._progress = prompt, progress
        self._folder, self._kept = folders  # where the dumps are written, and where they stay
        self.ours: Dump
        self.ref: Dump
        self.result: Comparison
        self.stopped = ""
        self.notes: list[str] = []
        self._described = reference.describe(request.model)
        self._requested_points: set[str] = set()  # by name, in all runs so far

    def rounds(self) -> Iterator[RoundReport]:
        """Run after run, until the operation has a name or another run would tell nothing new."""
        points = self._request.points
        side = self._side(points)
        known: Dump | None = None
        for number in range(1, MOST_ROUNDS + 1):
            try:
                printed = self._run(side, number)
            except DumpError as error:
                if known is None or error.code not in _NO_RECORDS:
                    raise
                self._keep(known)
                self.stopped = f"{self._command.name} printed none of these points: {points}"
                return
            self.ours = printed if known is None else self._together(known, printed)
            new = tuple(name for name in printed.points if known is None or name not in known.points)
            known = self.ours
            self.ref = self._reference_for(known, side.known)
            self.result = compared_on(
                self.ours,
                self.ref,
                comparison_options(self._request),
                self._request.model,
                self._request.arbiter,
                third_side=False,
            )
            wanted = [name for name in side.known if name in self._requested_points]
            verdict = held_to(self.result, wanted, side, self._request, self._prompt)
            self.result = replace(self.result, verdict=verdict)
            yield RoundReport(Round(number, points, new, verdict), self.ours, self.ref)
            if verdict or not verdict.next:
                return
            if number > 1 and not new:
                self.stopped = self._nothing_new(verdict)
                return
            if verdict.next == points:
                self.stopped = f"the records of {points} do not narrow it down further"
                return
            if not self._command.takes(POINTS):
                self.stopped = f"{self._command.name} prints the same points every time: put {POINTS} into its command"
                return
            points = verdict.next
            side = self._side(points)
            if side.requested and self._requested_points.issuperset(side.requested):
                self.stopped = self._nothing_new(verdict)
                return
        self.stopped = f"{MOST_ROUNDS} runs did not identify an operation"

    def _nothing_new(self, verdict: Verdict) -> str:
        """Why a run taught nothing: the points asked for are not there, or they are, with too few values."""
        lacking = [name for name in expand(verdict.next) if not any(fnmatchcase(point, name) for point in self.ours.points)]
        if lacking:
            return f"{self._command.name} printed none of these points: {','.join(lacking)}"
        if verdict.next_slice is not None:
            return (
                f"{self._command.name} printed these points already: print {verdict.next_slice} values per row, or the sketch"
            )
        return f"the records of {verdict.next} do not narrow it down further"

    def _side(self, points: str) -> ExternalEngine:
        layers = self._request.layers if points == self._request.points else None  # they choose among the default points only
        request = replace(self._request, points=points, layers=layers)
        return ExternalEngine(request, self._command, self._reference, described=self._described)

    def _run(self, side: ExternalEngine, number: int) -> Dump:
        self._requested_points.update(side.requested)
        if self._progress is not None:
            self._progress(f"run {number} of {side.name}", 0, None)
        out = self._folder / OURS_FILE  # where it stays if it cannot be believed; else the points of all runs replace it
        side.dump(self._prompt, out)
        printed = load(out, self._request.mapping)
        if not self._request.despite_lint:
            refuse_unusable(printed, "your engine's dump")
        return replace(printed, path=str(self._kept / OURS_FILE))

    def _together(self, before: Dump, now: Dump) -> Dump:
        """The points that either run printed; if both have one, the later records."""
        moved = [name for name in before.points if name in now.points and not _same(before.points[name], now.points[name])]
        if moved:
            self.notes.append(f"two runs of {self._command.name} differ at {moved[0]}: its numbers are not reproducible")
        return replace(now, points=before.points | now.points, tokens=now.tokens or before.tokens)

    def _keep(self, ours: Dump) -> None:
        """Write what all runs so far printed over what the last one did."""
        write(ours, self._folder / OURS_FILE, Header(source=self._command.name))

    def _reference_for(self, ours: Dump, known: Sequence[str]) -> Dump:
        self._keep(ours)
        followed = following(self._request, ours, self._prompt, known)
        LlamaCpp(followed, self._reference).dump(self._prompt, self._folder / REF_FILE, self._progress)
        return replace(load(self._folder / REF_FILE), path=str(self._kept / REF_FILE))


def _same(a: Rows, b: Rows) -> bool:
    return a.values.shape != b.values.shape or np.array_equal(a.values, b.values, equal_nan=True)


def _explained(request: Request, prompt: Prompt, ours: Dump, verdict: Verdict) -> tuple[Explanation | None, str, bool]:
    """The cause, or why it cannot be looked for, and whether it was looked for on the dump's own tokens.

    If the dump lists other tokens than the prompt's, a fault of the prompt's beginning may explain them. Otherwise what can be judged is
    what the engine computes from its own.
    """
    options = ExplainOptions(tokens=prompt.ids, compute=request.compute, backend=request.backend)
    place = verdict.first_divergence
    try:
        if place is None or place.checkpoint != TOKENS:
            return explain_dump(ours, request.model, options), "", False
        own = explain_dump(ours, request.model, replace(options, tokens=None))
        given = explain_dump(ours, request.model, replace(options, budget=_FOR_TOKENS)) if own else None
    except ParityError as error:
        return None, error.message, False
    beginning = given is not None and bool(given.causes) and given.remaining is None
    return (given, "", False) if beginning else (own, "", True)
