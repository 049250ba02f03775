"""Dumps of faulty engines, made by planting faults into ours: for tests, benchmarks and demonstrations."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from checkpoints.graph import RecordedGraph
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.backend import Array, choose
from engine.faults import CATALOGUE, as_recorded, plant
from engine.graph import Step
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.explain.case import ExplainOptions
from parity.run.ours import OursJob, dump

PATIENT = ExplainOptions(budget=3600.0)  # an answer that must not depend on the clock


@dataclass(frozen=True)
class Planted:
    """Faults in an engine: name, parameters, layers (None: all)."""

    faults: tuple[tuple[str, dict[str, Any], tuple[int, ...] | None], ...]

    def steps(self, steps: Sequence[Step]) -> list[Step]:
        """The faulty engine's steps."""
        for name, parameters, layers in self.faults:
            steps = plant(steps, CATALOGUE[name], layers, **parameters)
        return as_recorded(steps)


def tokens_of(model: Path, count: int, seed: int) -> tuple[int, ...]:
    """Seeded random ids."""
    rng = random.Random(seed)
    vocabulary = GgufModel(model).hyperparameters.n_vocab
    return tuple(rng.randrange(vocabulary) for _ in range(count))


def half_sums(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A product with partial sums of 32 terms in float16, as a tensor core with F16 accumulation: [T, in], [out, in] -> [T, out] or, for a
    weight [in], [T, 1].

    A right engine's arithmetic that `engine.replay.precision` does not copy.
    """
    weight = weight.reshape(-1, x.shape[1])
    total = np.zeros((x.shape[0], len(weight)), dtype=np.float16)
    for start in range(0, x.shape[1], 32):
        part = x[:, start : start + 32].astype(np.float16).astype(np.float32) @ weight[:, start : start + 32].T
        total = (total + part.astype(np.float16)).astype(np.float16)
    sums = total.astype(np.float32)
    return sums if bias is None else sums + bias


TOKENS = (2047, 430, 457, 258, 403, 12, 99)  # BOS and six others of the embedded model


class Faulty:
    """Writes the dumps of faulty engines of one model; `recorded` is llama.cpp's graph, where its steps are lifted from that."""

    def __init__(self, model: Path, recorded: RecordedGraph | None = None) -> None:
        self.model = model
        self.transformer = Transformer(GgufModel(model), choose("numpy"), recorded=recorded)
        self.right = self.transformer.steps

    def dump(
        self,
        planted: Planted,
        tokens: tuple[int, ...],
        *,
        points: str = "default",
        size: int = 16,
        generated: int = 0,
        bare: bool = True,
        steps: Sequence[Step] | None = None,
    ) -> Dump:
        """The dump of an engine with these faults, which it does not mention; `bare`: values only, no sketch and no statistics.

        `steps` are those of an engine that differs in another way than the catalogue knows, else the right engine's.

        Raises:
            ValueError: the model has no place for the fault.
        """
        self.transformer.steps = planted.steps(self.right if steps is None else steps)
        prompt, rest = tokens[: len(tokens) - generated], tokens[len(tokens) - generated :]
        with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):  # faults may overflow
            out = Path(folder) / "ours.jsonl"
            dump(self.transformer, OursJob(out=out, tokens=prompt, generated=rest, points=points, slice_size=size))
            written = read(out)
        if not bare:
            return written
        return replace(written, points={name: replace(rows, sketch=None, stats={}) for name, rows in written.points.items()})
