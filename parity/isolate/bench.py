"""The judges of a model: an isolator of its steps (and one of its encoder's), and checks that watch the values as they pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.answers.isolate import Operation
from checkpoints.graph import RecordedGraph
from engine.graph import ENCODED, Step, alone
from engine.opened import open_plain
from engine.replay.kept import KEPT, kept
from engine.replay.precision import rounded
from engine.replay.proof import is_weighed
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel

from ..diff.measured.tokens import too_few_tokens
from .attention_checks import AttentionChecks
from .elements import RowChecks
from .judging import Definition, Record
from .operation import Isolator
from .standards import Standard
from .values import RecordedValue, WholeValues

Arriving = Iterable[tuple[str, RecordedValue]]


class IsolationBench(Struct):
    """The model's steps, the checks that watch the values, and the isolators that judge them; both halves of an encoder–decoder."""

    transformer: Transformer
    isolator: Isolator
    attention: AttentionChecks
    rows: RowChecks
    encoder: Isolator | None = None

    @classmethod
    def of(
        cls,
        model: Path,
        graph: Callable[[], RecordedGraph],
        standard: Standard,
        limit: float,
        expected: int,
        rows: Sequence[int] = (),
        lower: Sequence[str] = (),
    ) -> Self:
        """The bench of a model file.

        Args:
            graph: records llama.cpp's graph, if the model's steps are lifted from it.
            standard: gives the definitions that operations are judged by.
            expected: the number of positions of the run.
            lower: arithmetics ("f16") in which products are right as well.
        """
        transformer = open_plain(GgufModel(model), "numpy", resident=False, recorded=graph)
        transformer.expect(expected)
        several, single = transformer.steps, transformer.single
        alternatives = standard(several)
        singles = [None] * len(alternatives) if single is None else standard(single)
        definitions = [Definition(steps, alone) for steps, alone in zip(alternatives, singles, strict=True)]
        definitions += [
            Definition(_lower(several, kind), None if single is None else _lower(single, kind), arithmetic=kind)
            for kind in lower
        ]
        weights = transformer.weights
        encoder = alone(transformer.encoder or ())
        return cls(
            transformer,
            Isolator(definitions, weights, limit),
            AttentionChecks.of((*encoder, *several), limit),
            RowChecks(rows, [definition.several for definition in definitions], weights, limit),
            Isolator(
                [
                    *(Definition(steps) for steps in standard(encoder)),
                    *(Definition(_lower(encoder, kind), arithmetic=kind) for kind in lower),
                ],
                weights,
                limit,
            )
            if encoder
            else None,
        )

    @property
    def isolators(self) -> list[Isolator]:
        """The encoder's isolator, if there is an encoder, and the model's."""
        return [self.isolator] if self.encoder is None else [self.encoder, self.isolator]

    @property
    def steps(self) -> list[Step]:
        """The steps of both, in the order of computation."""
        return [step for isolator in self.isolators for step in isolator.definitions[0].several]

    @property
    def products(self) -> frozenset[str]:
        """The points that are products with weights."""
        return frozenset(step.makes for step in self.steps if is_weighed(step))

    @property
    def rounding(self) -> dict[str, float]:
        """The points that agree only with products whose activations are rounded, where the mode asks for others: what rounding costs."""
        return {name: record.unrounded for name, record in self.records.items() if record.unrounded is not None}

    @property
    def records(self) -> dict[str, Record]:
        """What was found about each point of both."""
        return {name: record for isolator in self.isolators for name, record in isolator.records.items()}

    def decoded(self, tokens: NDArray[np.int64], generated: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at the model's positions for a prompt and what follows it: an encoder–decoder begins with a start token."""
        own = tokens if self.encoder is None else np.array([self.transformer.decoder_start or 0], dtype=np.int64)
        return np.concatenate([own, generated])

    def run(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], arriving: Arriving) -> None:
        """Judge one forward pass: its tokens and positions [T], and its values by point, in the order of computation."""
        self.isolator.run(tokens, positions, self.rows.watch(self.attention.watch(arriving)))

    def encode(self, tokens: NDArray[np.int64], arriving: Arriving) -> None:
        """Judge the encoder's pass over a prompt [T], whose last value the decoder's passes read."""
        assert self.encoder is not None
        last = self.encoder.steps[-1].makes

        def kept() -> Iterator[tuple[str, RecordedValue]]:
            for name, value in arriving:
                if name == last:
                    self.isolator.given[ENCODED] = value
                yield name, value

        self.encoder.run(tokens, np.arange(len(tokens), dtype=np.int64), self.attention.watch(kept()))

    def operations(self) -> list[Operation]:
        """The verdict on each step, in the order of the model; what attention shows is held against it."""
        for isolator in self.isolators:
            self.attention.settle(isolator.proven(), isolator.unknown() | isolator.suspects())
        return [operation for isolator in self.isolators for operation in isolator.operations()]


def feed(bench: IsolationBench, values: WholeValues, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
    """Judge every pass of a dump on a bench; returns the number of passes."""
    computed = [step.makes for step in bench.steps]
    if bench.encoder is not None:
        bench.encode(prompt, values.arriving(values.passes[0], computed, encoder=True))
    tokens = bench.decoded(prompt, generated)
    first = values.first
    bench.attention.first = first
    for step in values.passes:
        positions = values.positions(step)
        if not len(positions):
            continue  # of an encoder's pass alone
        if int(positions.max()) - first >= len(tokens):
            raise too_few_tokens(values.path, int(positions.max()), len(tokens), decoder=bench.encoder is not None)
        bench.run(tokens[positions - first], positions, values.arriving(step, computed))
    return len(values.passes)


def _lower(steps: Sequence[Step], kind: str) -> list[Step]:
    """The steps of an engine whose products round their factors to a lower type, or whose cache keeps keys and values in it."""
    return kept(steps, kind) if kind in KEPT else rounded(steps, kind, storage=False)
