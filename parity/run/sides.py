"""The sides that compute a prompt: our engine, a foreign engine that a command line starts, and llama.cpp, all with one protocol."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from checkpoints.errors import InputError
from checkpoints.mapping import Mapping
from checkpoints.points import expand, layer_outputs, select
from checkpoints.record import Dump
from engine.engine import Engine
from engine.opened import open_engine
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from reference.client import Reference
from reference.jobs import Description, DumpJob, DumpResult

from .command import MODEL, POINTS, PORTIONS, SEQUENCES, STATE, UBATCH, Command
from .ours import OursJob, chosen_points, dump
from .request import Progress, Prompt, Request
from .state import loaded, resumed

OURS, REF, EXEC = "ours", "ref", "exec"


class Side(Protocol):
    """An engine that computes prompts and writes a dump of each. The request says what to record; a side is opened once."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def points(self) -> str:
        """The points that the side is asked for, as a `--points` expression."""

    @property
    def ways(self) -> frozenset[str]:
        """The ways to compute a prompt that the side can be told, as placeholders: PORTIONS, UBATCH, SEQUENCES, STATE."""

    def check(self, prompt: Prompt) -> None:
        """Raise InputError for tokens that it cannot take."""

    def dump(self, prompt: Prompt, out: Path, progress: Progress | None = None) -> object:
        """Compute the prompt, then the tokens that it is led along, and write `out`.

        Raises:
            ParityError: the side refuses, fails, or leaves no dump.
        """


class OurEngine:
    """The engine that comes with parity. `resident`: keep the weights, because there is more than one forward pass.

    `engine` is an open engine, else one is opened here; `reference` records the graph of a model whose steps are not
    written by hand.
    """

    name = "our engine"
    every_way = frozenset({PORTIONS, SEQUENCES, STATE})  # no ubatches: it computes a pass as a whole

    def __init__(
        self,
        request: Request,
        reference: Reference | None = None,
        *,
        resident: bool | None = None,
        engine: Engine | None = None,
    ) -> None:
        self._request = request
        self._engine = engine or open_engine(
            GgufModel(request.model),
            request.backend,
            request.devices,
            resident=request.generate > 0 if resident is None else resident,
            native=request.mode == "native" and not request.full,  # only the exact engine writes whole tensors
            recorded=None if reference is None else partial(reference.graph, request.model, request.mode),
        )

    @property
    def engine(self) -> Engine:
        """The engine itself."""
        return self._engine

    @property
    def ways(self) -> frozenset[str]:
        """All ways but ubatches; for the fast engine, which keeps one sequence on the device, only portions."""
        return self.every_way if isinstance(self._engine, Transformer) else frozenset({PORTIONS})

    @property
    def points(self) -> str:
        """The points by name, since llama.cpp's graph has further nodes."""
        return ",".join(chosen_points(self._engine, self._request.points, self._request.layers))

    def check(self, prompt: Prompt) -> None:
        """Raise InputError for tokens that the model cannot take."""
        self._engine.check(prompt.ids + prompt.generated, self._request.first_position)
        self._engine.expect(len(prompt.ids + prompt.generated))

    def dump(self, prompt: Prompt, out: Path, progress: Progress | None = None) -> None:
        """Compute the prompt, then the tokens that it is led along, and write `out`."""
        report: Callable[[int, int], None] | None = None
        if progress is not None:
            update = progress

            def report(done: int, total: int) -> None:
                update("ours", done, total)

        dump(self._engine, OursJob.of(prompt, out, self._request, report))


class ExternalEngine:
    """A foreign engine that a command line starts. It is given `model`, or else the F32 twin (exact mode) or the file itself (native).

    `names` are the points that it is asked for, and `described` is the model, if they are known already.
    """

    def __init__(
        self,
        request: Request,
        command: Command,
        reference: Reference,
        *,
        model: Path | None = None,
        names: str | None = None,
        described: Description | None = None,
    ) -> None:
        self._request = request
        self._command = command
        self._reference = reference
        self._model = model
        self._known_names = names
        self._given_description = described

    @property
    def name(self) -> str:
        """Its program's name."""
        return self._command.name

    @property
    def points(self) -> str:
        """The points asked for; a foreign engine may record fewer."""
        request = self._request
        return ",".join(layer_outputs(request.layers)) if request.layers is not None else request.points

    @property
    def ways(self) -> frozenset[str]:
        """The ways that its command line names."""
        return self._command.ways

    def check(self, prompt: Prompt) -> None:
        """Do nothing: a foreign engine checks its tokens itself."""

    @cached_property
    def model(self) -> Path:
        """The file that it loads."""
        if self._model is not None:
            return self._model
        return self._reference.twin(self._request.model, joined=True) if self._request.mode == "exact" else self._request.model

    @property
    def not_run(self) -> tuple[str, ...]:
        """A sentence on the part of it that did not run, since it was given an F32 copy of the file."""
        if not self._command.takes(MODEL) or self.model == self._request.model:
            return ()
        return (
            "your engine read the F32 twin, so its own dequantisers did not run: --mode native runs them, "
            "parity weights --theirs checks them",
        )

    def dump(self, prompt: Prompt, out: Path, progress: Progress | None = None) -> None:
        """Run it, so that it writes `out`. Raises EngineError if it does not."""
        tokens = (*prompt.ids, *prompt.generated)
        if progress is not None:
            progress(self.name, 0, None)
        if prompt.saved:
            resumed(self._command, self.model, prompt, out, self.names)
            return
        self._command.run(
            model=self.model,
            tokens=tokens,
            out=out,
            points=self.names,
            portions=prompt.portions,
            sequences=(*prompt.companions, tokens),
            ubatch=prompt.ubatch,
        )

    @property
    def names(self) -> str:
        """What {points} stands for: the points by name, with commas, so that an engine need not understand globs.

        They are llama.cpp's names, as far as it has them.
        """
        if not self._command.takes(POINTS):
            return ""
        if self._known_names is not None:
            return self._known_names
        return ",".join(self.requested or dict.fromkeys(name for part in expand(self.points) for name in self._named(part)))

    def _named(self, part: str) -> list[str]:
        """The known points that a part of the request without braces names, or the part itself, which only the engine may know."""
        try:
            return select(part, self.known, self._described.n_layers)
        except InputError:
            return [part]

    @cached_property
    def known(self) -> tuple[str, ...]:
        """The points that llama.cpp has in this model, in dataflow order."""
        return tuple(name for name, _ in self._described.points)

    @cached_property
    def requested(self) -> tuple[str, ...]:
        """The known points that it is asked for; none if there is a name among them that only the engine knows."""
        try:
            return tuple(select(self.points, self.known, self._described.n_layers))
        except InputError:
            return ()

    @property
    def requested_by_name(self) -> bool:
        """Whether the points were asked for by name, by `{points}` or `--points`."""
        return self._command.takes(POINTS) or (self._request.points, self._request.layers) != ("default", None)

    @cached_property
    def _described(self) -> Description:
        return self._given_description or self._reference.describe(self._request.model)


class LlamaCpp:
    """llama.cpp, in the reference's process."""

    name = "llama.cpp"
    ways = frozenset({PORTIONS, UBATCH, SEQUENCES, STATE})

    def __init__(self, request: Request, reference: Reference) -> None:
        self._request = request
        self._reference = reference

    @property
    def points(self) -> str:
        """The points that were asked for."""
        return self._request.points

    def check(self, prompt: Prompt) -> None:
        """Do nothing: llama.cpp checks its tokens before it writes anything."""

    def dump(self, prompt: Prompt, out: Path, progress: Progress | None = None) -> DumpResult:
        """Compute the prompt, then the tokens that it is led along, then those that it chooses itself, and write `out`."""
        if progress is not None:
            progress(self.name, 0, None)
        request = self._request
        return self._reference.dump(
            DumpJob(
                request.model,
                out,
                prompt.ids,
                prompt=prompt.text,
                pieces=prompt.pieces,
                generate=0 if prompt.generated else request.generate,
                lead=prompt.generated or None,
                portions=prompt.portions,
                ubatch=prompt.ubatch,
                companions=prompt.companions,
                saved=prompt.saved,
                decoded=prompt.decoded,
                window=request.window,
                threads=request.threads,
                **request.recording(),
            )
        )


def side_of(source: str, request: Request, reference: Reference, *, resident: bool | None = None) -> Side:
    """The side of that name: "ours", "ref" or "exec".

    Raises:
        InputError: a foreign engine without its command.
    """
    if source == EXEC:
        if request.command is None:
            raise InputError("no command was given to run your engine.", "Give one with --exec.", code="exec")
        return ExternalEngine(request, request.command, reference)
    return LlamaCpp(request, reference) if source == REF else OurEngine(request, reference, resident=resident)


def recorded(side: object, out: Path, prompt: Prompt, mapping: Mapping) -> Dump:
    """A side's records of one prompt: a foreign engine prints every sequence of a batch, and after a restored state only the rest.

    Raises:
        DumpError, EngineError: as in `state.loaded`.
    """
    return loaded(out, prompt if isinstance(side, ExternalEngine) else replace(prompt, companions=(), saved=0), mapping)
