"""Two dumps of an engine that computes several prompts at once, step by step: each sequence is compared by itself."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from cli import Cli

from checkpoints.reading.reader import read
from engine.backend import choose
from engine.engine import Progress
from engine.kv_cache import KvCache
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity import emit
from parity.run.ours import OursJob, dump

PROMPTS = ((1, 403, 407, 261, 378, 390), (1, 9, 700, 31, 5, 12))
STEPS = (3, 1, 1, 1)
Values = Mapping[str, np.ndarray]


class Shared(Transformer):
    """A fault: every sequence has the caches of the first one."""

    caches: tuple[KvCache, ...] = ()

    def start(self, first_position: int = 0) -> Progress:
        self.caches = self.caches or super().start().caches
        return Progress(first_position, self.caches)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file that `parity emit python` prints, as a module."""
    module = ModuleType("parity_dump")
    monkeypatch.setitem(sys.modules, "parity_dump", module)  # dataclasses look their module up
    exec(compile(emit.source("python"), "parity_dump.py", "exec"), module.__dict__)
    return module


def values(model: Path, out: Path, prompt: int, engine: type[Transformer] = Transformer) -> Values:
    """What an engine computes of a prompt; one with shared caches computes the other one in between."""
    batch = {} if engine is Transformer else {"companions": (PROMPTS[1 - prompt],)}
    dump(engine(GgufModel(model), choose("numpy")), OursJob(out, PROMPTS[prompt], points="all", slice_size=1 << 20, **batch))
    return {name: rows.values for name, rows in read(out).points.items() if rows.values.shape[1] == rows.counts.min()}


def recorded(recorder: ModuleType, out: Path, sequences: Sequence[Values], portions: Sequence[int]) -> Path:
    """The dump of an engine that computes [B, T, n] in portions: [2, 3, n], then [2, 1, n] three times."""
    points = [name for name in sequences[0] if not name.startswith("blk") or name.endswith(("l_out", "attn_out"))]
    with recorder.Recorder(out, compute="f32") as record:
        start = 0
        for count in portions:
            for name in points:
                record(name, np.stack([rows[name][start : start + count] for rows in sequences]))
            start += count
    return out


def test_sequences_of_a_batch_step_by_step(
    recorder: ModuleType, parity: Cli, synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """Two prompts at once and step by step agree, each by itself; a cache that both share, one of them that sees the other's keys, and two
    that are exchanged are told apart.
    """
    model = synthetic(layers=2)
    right = [values(model, tmp_path / "x.jsonl", number) for number in (0, 1)]
    shared = [values(model, tmp_path / "x.jsonl", number, Shared) for number in (0, 1)]
    whole = recorded(recorder, tmp_path / "whole.jsonl", right, (6,))

    def said(sequences: Sequence[Values]) -> tuple[int, list[tuple[str, str, str]], str]:
        steps = recorded(recorder, tmp_path / "steps.jsonl", sequences, STEPS)
        code, answer = parity.json("consistency", whole, steps)
        checks = [(check["name"], check["suspect"], check["reason"]) for check in answer["checks"]]
        return code, checks, answer["checks"][0]["what"]

    assert said(right) == (
        0,
        [("sequence 0", "", ""), ("sequence 1", "", "")],
        "whole.jsonl (6) against steps.jsonl (3 + 3 × 1)",
    )
    code, checks, _ = said([right[0], shared[1]])
    assert (code, [suspect for _, suspect, _ in checks]) == (1, ["", "sequences"])
    assert checks[1][2].startswith("sequence 0 agrees: ")
    code, checks, _ = said(shared)
    assert (code, [suspect for _, suspect, _ in checks]) == (1, ["sequences", "sequences"])
    code, checks, _ = said(right[::-1])
    assert code == 1
    assert [reason for _, _, reason in checks] == [
        f"what whole.jsonl has here, steps.jsonl has of sequence {other}: they are numbered differently" for other in (1, 0)
    ]
    assert "same portions (6)" in parity("consistency", whole, whole).err


def test_a_batch_against_the_same_prompts_one_by_one(
    recorder: ModuleType, parity: Cli, synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """Prompts in one batch are compared with the same ones in a pass each, or with one of them alone, though each has the same portion."""
    model = synthetic(layers=2)
    right = [values(model, tmp_path / "x.jsonl", number) for number in (0, 1)]
    shared = [right[0], values(model, tmp_path / "x.jsonl", 1, Shared)]
    alone = recorded(recorder, tmp_path / "alone.jsonl", right[:1], (6,))
    lines = list(map(json.loads, recorded(recorder, tmp_path / "x.jsonl", right, (6,)).read_text().splitlines()))
    one_by_one = tmp_path / "one_by_one.jsonl"
    one_by_one.write_text("".join(json.dumps(line | {"step": line.get("seq", 0)}) + "\n" for line in lines))

    def said(sequences: Sequence[Values], other: Path) -> tuple[int, list[str], str, list[str]]:
        code, answer = parity.json("consistency", recorded(recorder, tmp_path / "batch.jsonl", sequences, (6,)), other)
        return code, [check["suspect"] for check in answer["checks"]], answer["checks"][0]["what"], answer["not_checked"]

    title = "batch.jsonl (12) against one_by_one.jsonl (2 × 6)"
    assert said(right, one_by_one) == (0, ["", ""], title, [])
    assert said(shared, one_by_one) == (1, ["", "sequences"], title, [])
    code, suspects, _, not_checked = said(right, alone)
    assert (code, suspects, not_checked[0]) == (0, [""], "sequence 1: only one of the dumps has it")
