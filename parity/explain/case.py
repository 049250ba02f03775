"""One dump beside the right engine: its model, tokens, passes and records."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.errors import ModelError
from checkpoints.formats import shifted
from checkpoints.record import Dump, Header
from engine.backend import Array
from engine.graph import Step
from engine.opened import open_plain
from engine.replay.precision import sparing
from engine.replay.replay import Replay
from engine.replay.right_values import same_start
from engine.replay.wide import Variant
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel

from ..arbiter.arbiter import Arbiter
from ..diff.measured.tokens import same_model, too_few_tokens
from ..diff.tolerances.truth import AUTO
from ..run.graphs import recorded_graph
from .budget import Budget
from .records.captured import as_captured
from .records.comparable import first_sequence, of_prompt, passes_of, rows_of_positions, tokens_of
from .records.expert_order import by_score
from .records.noise import allowed
from .records.of_pass import without_values_of_passes
from .records.records import Expected, Ints, expected
from .records.ties import resolved
from .search.screening import Screening


class ExplainOptions(Struct, frozen=True):
    """How to search.

    `tokens` are those of the dump, if its header does not list them; `budget` is in seconds, None: as `Budget` says. `arbiter`: whether
    the same steps in float64 set the limits of records that exceed the table's: never ("off"), where that can decide ("auto"), or
    wherever something differs ("all").
    """

    tokens: tuple[int, ...] | None = None
    max_faults: int = 4
    budget: float | None = None
    backend: str = "auto"
    compute: str | None = None
    arbiter: str = AUTO


class Half(Struct, frozen=True):
    """A model by itself, or one half of an encoder–decoder, with the names of a model by itself.

    `given` are the values that its steps read and none of them makes; `truth` gives those of another variant, `rounded` those
    of a lower arithmetic, with the activations rounded or the products alone. `coarse` are the given values that ggml computes coarsely.
    """

    transformer: Transformer
    given: Mapping[str, Array] = field(default_factory=dict)
    truth: Callable[[Variant], Mapping[str, NDArray[Any]]] = lambda _: {}
    rounded: Callable[[str, bool], Mapping[str, Array]] = lambda _kind, _storage: {}
    coarse: frozenset[str] = frozenset()


def open_model(model: Path, options: ExplainOptions) -> Transformer:
    """Our engine of a model.

    Raises:
        ModelError: an architecture that our engine does not have, or an unusable file.
    """
    return open_plain(GgufModel(model), options.backend, recorded=partial(recorded_graph, model))


class Case:
    """One dump beside the right engine: the model, the replay of the dump's tokens, and its records.

    Args:
        model: a file, or an engine that is open.

    Raises:
        ModelError: an encoder–decoder; what `open_model` raises.
        DumpError: no tokens are known, or no record is of a point that our engine has.
        InputError: the dump is of another model; the F32 twin of a model counts as the model.
    """

    def __init__(self, dump: Dump, model: Path | Half, options: ExplainOptions) -> None:
        half = Half(open_model(model, options)) if isinstance(model, Path) else model
        if half.transformer.encoder is not None:
            raise ModelError(
                f"{half.transformer.hp.architecture} has two lists of steps: its encoder's and its decoder's.",
                "Each is a case of its own.",
                code="encoder-decoder",
            )
        self.dump = first_sequence(dump)
        self._compute = options.compute or ""
        self.spared: tuple[int, ...] = ()  # rows that the engine computes in float32, whatever its arithmetic
        self.transformer = half.transformer
        self.given = half.given
        self._truth = half.truth
        self._coarse = half.coarse
        self.rounded = half.rounded
        self.dump, left_out = rows_of_positions(self.dump, self.transformer.steps)
        tokens = tokens_of(self.dump, options.tokens)
        if options.tokens is not None:
            self.dump = of_prompt(self.dump, tokens)
        self.transformer.check(tokens, 0)
        self.transformer.expect(len(tokens))
        last = max(int(rows.token_idx.max()) for rows in self.dump.points.values())
        first = min(int(rows.token_idx.min()) for rows in self.dump.points.values())
        prompt = len(self.dump.header.tokens) if self.dump.header is not None and self.dump.header.tokens else len(tokens)
        # Positions count from 0, unless the dump of a long-context run begins beyond its own tokens.
        first = first if last >= len(tokens) and last - first < len(tokens) else 0
        if last - first >= len(tokens):
            raise too_few_tokens(dump.path, last, len(tokens), decoder=bool(half.given))
        same_model(self.dump, Path(self.transformer.model.path))
        self.tokens = tokens
        self._count_from(first, prompt)
        self.entries, notes = expected(self.dump, self.replay, self.positions, self.header())
        if first:
            notes = (*self._from_zero(first, prompt), *notes)
        self.arbiter = self.truth_of(self.transformer.steps)
        self._arbiter_option = options.arbiter
        self.entries, noise = allowed(self.entries, self.replay, self.positions, self.arbiter, options.arbiter)
        self.noise = noise
        self.notes = (*self.dump.notes, *left_out, *notes, *self._adapted, *resolved(self))
        self.entries, captured = as_captured(self.entries, self.transformer.steps)
        self.notes = (*self.notes, *captured)

    def _count_from(self, first: int, prompt: int) -> None:
        """Make the right engine's replay, with the first token at this position."""
        self.positions: Ints = np.arange(len(self.tokens), dtype=np.int64) + first
        self.passes = passes_of(self.dump, self.positions, prompt)
        self.replay = self.make(self.transformer.steps, len(self.tokens))
        self.dump, of_passes = without_values_of_passes(self.dump, self.transformer.steps, self.passes)
        self.dump, reordered = by_score(self.dump, self.replay, self.positions)
        self._adapted = (*of_passes, *reordered)  # what was changed to compare the records with the replay

    def _from_zero(self, first: int, prompt: int) -> tuple[str, ...]:
        """Count the dump's positions from 0 if the model then gives more of its records, and say so: some engines number lines from 1."""
        numbered, entries = (self.dump, self.positions, self.passes, self.replay, self._adapted), self.entries
        self.dump = replace(shifted(self.dump, -first), notes=self.dump.notes)
        self._count_from(0, prompt)
        self.entries, _ = expected(self.dump, self.replay, self.positions, self.header())
        before, now = (sum(int(entry.over.sum()) for entry in of) for of in (entries, self.entries))
        if now < before:
            records = f"{before - now:,} more record{'s' * (before - now != 1)}"
            return (
                f"positions: the dump's are moved by {-first:+d}, where {records} are the model's (it begins at position {first})",
            )
        (self.dump, self.positions, self.passes, self.replay, self._adapted), self.entries = numbered, entries
        return ()

    def compared(self, steps: Sequence[Step]) -> list[Expected]:
        """The dump's records beside those of another list of steps."""
        replay = self._replay_of(steps)
        entries = self.beside(steps, replay)
        return allowed(entries, replay, self.positions, self.truth_of(steps), self._arbiter_option)[0]

    def beside(self, steps: Sequence[Step], replay: Replay | None = None) -> list[Expected]:
        """The dump's records beside those of another list of steps, with the usual limits."""
        return expected(self.dump, replay or self._replay_of(steps), self.positions, self.header())[0]

    def take(self, steps: Sequence[Step], entries: list[Expected]) -> None:
        """Make another list of steps the right engine."""
        self.transformer.steps = list(steps)
        self.replay, self.arbiter = self._replay_of(steps), self.truth_of(steps)
        self.entries = entries

    def with_steps(self, steps: Sequence[Step], entries: list[Expected], note: str = "") -> "Case":
        """The case of another list of steps, with its records beside theirs."""
        other = copy(self)
        other.transformer = copy(self.transformer)
        other.take(steps, entries)
        other.noise = ()
        other.notes = (*self.notes, note) if note else self.notes
        return other

    def without(self, points: Collection[str]) -> "Case":
        """The case without the records of these points."""
        other = copy(self)
        other.dump = replace(self.dump, points={name: rows for name, rows in self.dump.points.items() if name not in points})
        other.entries = [entry for entry in self.entries if entry.point not in points]
        return other

    @property
    def states_f32(self) -> bool:
        """Whether the dump or the user says that it was computed in float32: then lower arithmetic is no excuse."""
        known = self.dump.header
        if self._compute or known is None:
            return self._compute.lower() == "f32"
        # In native mode products round the activations, and a cache of another type rounds keys and values, whatever the arithmetic.
        return known.compute.lower() == "f32" and known.mode != "native" and known.kv_type.lower() in ("", "f32")

    @property
    def states_arithmetic(self) -> bool:
        """Whether the dump or the user says in which arithmetic it was computed."""
        return bool(self._compute or (self.dump.header is not None and self.dump.header.compute))

    @property
    def stated_by(self) -> str:
        """What says that the dump was computed in float32: "--compute", "header", or nothing, ""."""
        return "" if not self.states_f32 else "--compute" if self._compute else "header"

    def make(
        self, steps: Sequence[Step], rows: int, longer: Replay | None = None, given: Mapping[str, Array] | None = None
    ) -> Replay:
        """A replay over the first rows; it may take values from `longer`, a replay over more of them."""
        return Replay(
            self.lowered(steps, rows),
            self.tokens[:rows],
            self.positions[:rows].tolist(),
            self.passes[:rows],
            self.transformer.weights,
            self.transformer.backend,
            longer,
            {**self.given, **(given or {})},
        )

    def lowered(self, steps: Sequence[Step], rows: int) -> Sequence[Step]:
        """Steps in a lower arithmetic, which the rows that this engine computes in float32 keep (`sparing`)."""
        return sparing(steps, self.spared, rows) if self.spared else steps

    def sparing(self, rows: Collection[int]) -> "Case":
        """The case of an engine in a lower arithmetic that computes these rows in float32."""
        other = copy(self)
        other.spared = tuple(rows)
        return other

    def _replay_of(self, steps: Sequence[Step]) -> Replay:
        """A replay of all tokens; of the right engine's own steps the one whose values are known."""
        same = len(steps) == len(self.replay.steps) == same_start(steps, self.replay.steps)
        return self.replay if same else self.make(steps, len(self.tokens))

    def truth_of(self, steps: Sequence[Step]) -> Arbiter:
        """The float64 values of a list of steps over the dump's tokens."""
        weights, backend = self.transformer.weights, self.transformer.backend
        return Arbiter(
            steps, weights, backend, self.tokens, self.positions.tolist(), self.passes, self._truth, coarse=self._coarse
        )

    def header(self) -> Header:
        """The header that a dump of our engine would have."""
        known = self.dump.header
        return Header(
            source="engine",
            model=self.transformer.model.info,
            tokens=known.tokens if known is not None else self.tokens,
            prompt=known.prompt if known is not None else None,
            mode="exact",
            compute="f32",
            kv_type="f32",
        )

    def screening(self, entries: Sequence[Expected], budget: Budget) -> Screening:
        """A screening over these records."""
        return Screening(
            entries,
            self.transformer.steps,
            self.replay,
            self.make,
            self.positions,
            self.transformer.backend,
            budget,
            self.truth_of,
        )
