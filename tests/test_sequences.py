"""Our engine among other sequences and from a saved state: the same numbers, and faults that only these ways show."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from checkpoints.errors import InputError
from checkpoints.reading.reader import read
from engine import saved_state
from engine.backend import choose
from engine.engine import Progress
from engine.kv_cache import KvCache
from engine.opened import open_plain
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.run.ours import OursJob, dump
from reference.client import Reference

IDS = (1, 403, 407, 261, 378, 390)
WAYS = {"batch": {"companions": ((5, 9), IDS, (*IDS, 7, 8, 9))}, "state": {"saved": 3}}


class Forgetful(Transformer):
    """A fault: every sequence has the caches of the first one."""

    caches: tuple[KvCache, ...] = ()

    def start(self, first_position: int = 0) -> Progress:
        self.caches = self.caches or super().start().caches
        return Progress(first_position, self.caches)


def logits(engine: Transformer, out: Path, way: str = "") -> np.ndarray:
    """[positions, V] of the prompt computed that way, and of two tokens after it."""
    dump(engine, OursJob(out, IDS, points="logits", slice_size=None, generated=(11, 12), **WAYS.get(way, {})))
    return read(out).points["logits"].values


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum((a - b) ** 2) / np.sum(b**2))


@pytest.mark.parametrize("architecture", ["qwen2", "mamba"])
def test_other_ways_give_the_same_numbers(
    architecture: str, synthetic: Callable[..., Path], small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """A batch and a restored state agree with one pass, for keys and values and for recurrent states, and so do later tokens."""
    model = synthetic(layers=2) if architecture == "qwen2" else small_model(architecture, "f32", layers=2)
    engine = open_plain(GgufModel(model), "numpy", recorded=lambda: reference.graph(model))
    whole = logits(engine, tmp_path / "dump.jsonl")
    assert len(whole) == len(IDS) + 2
    for way in WAYS:
        assert distance(logits(engine, tmp_path / "dump.jsonl", way), whole) < 1e-10, way


def test_a_sequence_that_sees_the_others_is_seen(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """Caches that sequences share are right alone and wrong in a batch."""
    right, wrong = (kind(GgufModel(synthetic(layers=2)), choose("numpy")) for kind in (Transformer, Forgetful))
    alone = logits(right, tmp_path / "dump.jsonl")
    assert distance(logits(wrong, tmp_path / "dump.jsonl"), alone) < 1e-10
    wrong.caches = ()
    assert distance(logits(wrong, tmp_path / "dump.jsonl", "batch"), alone) > 1e-4


def test_a_state_is_read_as_it_was_written(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A saved sequence goes on as the first one does, to the bit; what is no state, or a folder, is one sentence."""
    engine = Transformer(GgufModel(synthetic(layers=2)), choose("numpy"))
    first, second, path = engine.start(3), engine.start(), tmp_path / "state"
    engine.forward(IDS, first)
    saved_state.save(first, engine.cache_backends, path)
    saved_state.restore(path, second, engine.cache_backends)
    assert (second.first, second.length, second.passes) == (3, len(IDS), 1)
    assert np.array_equal(engine.forward([7], first), engine.forward([7], second))
    path.write_bytes(b"no state")
    for wrong in (path, tmp_path):
        with pytest.raises(InputError, match="not a state"):
            saved_state.restore(wrong, engine.start(), engine.cache_backends)
    with pytest.raises(InputError, match="cannot save"):
        saved_state.save(Progress(0), (), path)
