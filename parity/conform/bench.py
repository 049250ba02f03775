"""One cell after another: make the model, get llama.cpp's dump, run the side, compare both, look for the cause."""

from pathlib import Path
from time import perf_counter

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.conform import (
    CHANGED,
    CRASHED,
    DIVERGENCE,
    LOWER,
    NO_REFERENCE,
    PARITY,
    REFUSED,
    TIMED_OUT,
    UNDECIDED,
    UNUSABLE,
    Cell,
    CellResult,
)
from checkpoints.answers.diff import INCOMPLETE, Verdict
from checkpoints.answers.explain import Explanation
from checkpoints.errors import DISK, MEMORY, OUTPUT, DumpError, ParityError
from checkpoints.points import LOGITS, parse
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from reference.client import Reference
from reports import explanation as answers
from reports.findings import finding
from reports.html import write_html
from reports.report import Report
from reports.sentences import headline, uncompared

from ..diff.compare import Comparison
from ..run import command as engines
from ..run.command import POINTS, EngineError
from ..run.hugging_face import HuggingFace
from ..run.request import Prompt, Request
from ..run.served import ServedModel
from ..run.session import comparison_options
from ..run.sides import ExternalEngine, LlamaCpp, OurEngine, recorded
from . import identity, results
from .matrix import PREFILL, prompt_of
from .models import Models, model_name
from .served import TEXTS, Asking, served_cell

_SLICE = 256  # leading values of llama.cpp's records: whole rows of nearly everything in a tiny model
_EXPLAIN = 20.0  # seconds for the cause of one cell
_VERDICTS = {engines.CRASHED: CRASHED, engines.REFUSED: REFUSED, engines.TIMED_OUT: TIMED_OUT}


class Settings(Struct, frozen=True):
    """What all cells of a run share: how the side is started and judged (`run`; model and tokens come from the cells).

    The side is `run.command` (an engine that writes dumps, or with `server` one that is asked over HTTP), else `hugging_face`, else
    our engine.
    """

    run: Request
    folder: Path
    explain: bool = True
    server: Asking | None = None
    hugging_face: HuggingFace | None = None

    @property
    def name(self) -> str:
        """The side's short name."""
        if self.run.command is not None:
            return self.run.command.name
        return "hf" if self.hugging_face is not None else "ours"

    @property
    def side(self) -> str:
        """A description of the side."""
        if self.run.command is not None:
            return self.run.command.line
        return self.hugging_face.name if self.hugging_face is not None else "our engine"


def key_of(settings: Settings, engine: str, cell: Cell) -> str:
    """What a cell's result depends on, known before its model is made; `engine` is `identity.of_command`'s."""
    run = settings.run
    judged = (run.compute, run.tolerance, run.mapping, settings.explain, run.command.timeout if run.command else None)
    model = model_name(cell.architecture, cell.type, identity.program())
    prompt = TEXTS[cell.prompt] if settings.server else prompt_of(cell)
    return identity.digest(identity.program(), engine, model, prompt, cell.mode, judged, settings.server)


class Bench:
    """Runs cells in one process, with one llama.cpp, which the first cell that needs it starts. A context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reference = Reference(threads=settings.run.threads, verbose=settings.run.verbose, start=False)
        self._models = Models(settings.folder / "models", self._reference, identity.program())
        command = settings.run.command
        self._stamps = () if command is None else identity.stamps(command)
        self._engine = identity.of_side(settings.run.command, settings.hugging_face)
        self._server = ServedModel(settings.run.command) if settings.server and settings.run.command is not None else None
        self._causes: dict[tuple[str, str, str], tuple[str, str]] = {}  # architecture, type, first divergent kind

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.idle()
        self._reference.close()

    def idle(self) -> None:
        """End what runs for single models: a server."""
        if self._server is not None:
            self._server.stop()

    def run(self, cell: Cell) -> CellResult:
        """The cell's result, taken from an earlier run if nothing that it depends on has changed."""
        began = perf_counter()
        key = key_of(self._settings, self._engine, cell)
        if (kept := results.load(self._settings.folder, cell, key)) is not None:
            return kept
        try:
            model = self._models.path(cell.architecture, cell.type)
        except ParityError as error:
            if ends_the_run(error):
                raise
            result = CellResult(cell, NO_REFERENCE, error.message)
        else:
            try:
                result = self._fresh(cell, model)
            except Exception as error:  # a fault of ours in one cell must neither be hidden nor lose all the others
                if ends_the_run(error):
                    raise
                result = CellResult(cell, CRASHED, f"internal error of parity: {type(error).__name__}: {error}")
        result = replace(result, key=key, seconds=perf_counter() - began)
        if self._replaced():  # nobody knows which build this is a result of
            return replace(result, key=CHANGED)
        results.save(self._settings.folder, result)
        return result

    def _replaced(self) -> bool:
        command = self._settings.run.command
        try:
            return command is not None and identity.stamps(command) != self._stamps
        except OSError:  # just being replaced
            return True

    def _fresh(self, cell: Cell, model: Path) -> CellResult:
        prompt = prompt_of(cell)
        assert prompt is not None  # the matrix contains no such cells
        request = replace(self._settings.run, model=model, tokens=prompt.ids, points="all", slice_size=_SLICE)
        out = self._settings.folder / "dumps" / f"{cell.name.replace(' ', '-')}.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._server is not None and self._settings.server is not None:
                return served_cell(cell, request, self._server, self._settings.server, self._reference, self._settings.folder)
            side = self._side(request)
            if isinstance(side, OurEngine) and side.engine.encoder is not None:
                prompt = replace(prompt, decoded=prompt.ids[:-1])  # what portions are of: the decoder is led along the prompt
            side.dump(prompt, out)
            ours = recorded(side, out, prompt, request.mapping)
        except DumpError as error:  # its path differs in every cell
            return CellResult(cell, UNUSABLE, error.message.replace(str(out), "its dump"))
        except EngineError as error:
            if ends_the_run(error):
                raise
            verdict = _VERDICTS.get(error.how, UNUSABLE)
            return CellResult(cell, verdict, error.message.replace(str(model), "the model"))
        except ParityError as error:  # our own engine lacks the model
            if ends_the_run(error):
                raise
            return CellResult(cell, REFUSED, error.message)
        try:  # only now: a cell that the side refuses needs no reference
            whole = Prompt(None, prompt.ids, (), decoded=prompt.decoded)
            ref = self._reference_dump(request, whole, identity.of_file(model), cell.prompt)
        except ParityError as error:
            if ends_the_run(error):
                raise
            return CellResult(cell, NO_REFERENCE, error.message)
        try:
            return self._judged(cell, request, ours, ref)
        except ParityError as error:  # the dump cannot be compared: it is of another model, has other tokens, other rows
            if ends_the_run(error):
                raise
            return CellResult(cell, UNUSABLE, error.message.replace(str(out), "its dump"))

    def _side(self, request: Request) -> ExternalEngine | HuggingFace | OurEngine:
        if request.command is None:
            hf_engine = self._settings.hugging_face
            return (
                OurEngine(request, self._reference, resident=True)
                if hf_engine is None
                else replace(hf_engine, model=request.model)
            )
        names = self._models.points(request.model) if request.command.takes(POINTS) else ""
        return ExternalEngine(request, request.command, self._reference, model=request.model, names=names)

    def _reference_dump(self, request: Request, prompt: Prompt, model_key: str, name: str) -> Dump:
        """llama.cpp's dump of a model and prompt: made once, whichever side is compared with it."""
        key = identity.digest(identity.program(), model_key, prompt.ids, prompt.decoded)
        out = self._settings.folder / "reference" / f"{key}-{name}.jsonl"
        if out.exists():
            dump = read(out)
            if dump.end is not None:
                return dump
        LlamaCpp(replace(request, mode="exact"), self._reference).dump(prompt, out)
        return read(out)

    def _judged(self, cell: Cell, request: Request, ours: Dump, ref: Dump) -> CellResult:
        from ..explain.on_model import compared_on  # with the arbiter and all steps

        comparison = compared_on(ours, ref, comparison_options(request), request.model, third_side=False)
        verdict, precision = comparison.verdict, comparison.verdict.precision
        lower = precision.arithmetic.upper() if precision is not None and precision.in_float32 else ""
        explanation: Explanation | None = None
        worst = verdict.worst
        result = CellResult(
            cell,
            (LOWER + lower if lower else PARITY) if verdict else DIVERGENCE,
            compared=verdict.compared,
            nmse=None if worst is None else worst.nmse,
            of_limit=None if worst is None else worst.of_limit,
            worst="" if worst is None else worst.checkpoint,
            rope=self._models.rope(request.model),
        )
        if verdict and LOGITS in verdict.uncompared.points:
            return replace(result, verdict=UNUSABLE, reason=f"{uncompared(verdict.uncompared)}: {LOGITS} never came")
        if verdict.verdict == INCOMPLETE:
            return replace(result, verdict=UNDECIDED, reason=headline(verdict))
        if verdict:
            return result
        first = verdict.first_divergence
        # If other prompts and modes of one model differ first at the same operation, they share the cause: it is looked for once.
        place = cell.architecture, cell.type, parse(first.checkpoint).kind if first is not None else ""
        if place not in self._causes:
            explanation = self._explained(request, ours)
            self._causes[place] = cause_of(verdict, explanation)
        cause, sentence = self._causes[place]
        if cell.mode != PREFILL and self._passed(replace(cell, mode=PREFILL)):
            cause = f"{cause}, in {cell.mode} only"
        return replace(
            result,
            checkpoint=first.checkpoint if first is not None else "",
            token_idx=first.token_idx if first is not None else -1,
            cause=cause,
            sentence=sentence,
            report=self._report(cell, ours, ref, comparison, explanation),
        )

    def _passed(self, cell: Cell) -> bool:
        """Whether that cell was parity."""
        kept = results.load(self._settings.folder, cell, key_of(self._settings, self._engine, cell))
        return kept is not None and kept.verdict == PARITY

    def _explained(self, request: Request, ours: Dump) -> Explanation | None:
        if not self._settings.explain:
            return None
        from ..explain.case import ExplainOptions
        from ..explain.input import explain_dump

        known = ours.header is not None and bool(ours.header.tokens)
        options = ExplainOptions(tokens=None if known else request.tokens, budget=_EXPLAIN, compute=request.compute)
        try:
            return explain_dump(ours, request.model, options)
        except ParityError:  # an architecture that cannot be replayed: the comparison's own description is used
            return None

    def _report(self, cell: Cell, ours: Dump, ref: Dump, comparison: Comparison, explanation: Explanation | None) -> str:
        name = f"cells/{cell.name.replace(' ', '-')}.html"
        beside = () if explanation is None else (finding(answers.as_json(explanation), "explain"),)
        write_html(Report(comparison.verdict, ours, ref, comparison.picture, beside), self._settings.folder / name)
        return name


def ends_the_run(error: Exception) -> bool:
    """Whether it says nothing of the cell, and every other cell would meet it too: no engine to start, no place to write to."""
    return isinstance(error, ParityError) and (
        error.code in (OUTPUT, DISK, MEMORY) or (isinstance(error, EngineError) and error.how == engines.NOT_STARTED)
    )


def cause_of(verdict: Verdict, explanation: Explanation | None) -> tuple[str, str]:
    """The cause: a short form, the same for cells that fail alike, and a sentence: the fault, otherwise the operation or the place."""
    if explanation is not None and explanation.causes:
        names = " + ".join(cause.named.fault for cause in explanation.causes)
        return names, "; ".join(cause.named.sentence for cause in explanation.causes)
    first = verdict.first_divergence
    if first is None:
        return "records are missing", ""
    kind = parse(first.checkpoint).kind
    if verdict.operation:
        return f"{kind} (operation)", verdict.operation
    pattern = verdict.pattern.sentence if verdict.pattern is not None else ""
    return f"first at {kind}", pattern
