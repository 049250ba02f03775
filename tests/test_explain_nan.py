"""`parity explain` of values that are not a number, where a lower arithmetic's limits are wide: none of them is that arithmetic's noise."""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, small_engine
from msgspec.structs import replace
from planted import PATIENT, Faulty

from checkpoints.answers.explain import Explanation
from checkpoints.record import Dump
from engine.backend import Array
from engine.replay.precision import rounded
from parity.explain.explain import explain

_LAW = "element 5 alone is NaN"
_STATED = ("f16", "bf16")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2."""
    return small_engine(tmp_path_factory.mktemp("nan"))


def _lost(own: Callable[..., Array], *inputs: Any, **params: Any) -> Array:
    value = own(*inputs, **params).copy()
    value[3, 5] = np.nan
    return value


def _dump(engine: Faulty, kind: str, points: str, lost: str = "") -> Dump:
    """The dump of an engine that states this arithmetic, in which one operation makes NaN in one element of position 3."""
    lower = rounded(engine.right, kind, storage=False)
    steps = [replace(step, op=partial(_lost, step.op)) if step.makes == lost else step for step in lower]
    dump = engine.dump(RIGHT, PROMPT, points=points, steps=steps, bare=False)
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute=kind))


def _answer(engine: Faulty, dump: Dump) -> Explanation:
    answer = explain(dump, engine.model, replace(PATIENT, budget=5.0))
    assert answer.causes == ()
    assert answer.first is not None
    assert (answer.first.token_idx, answer.first.nmse) == (3, inf)
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("kind", _STATED)
def test_nan_that_an_engine_computes_is_no_noise(engine: Faulty, kind: str) -> None:
    """NaN in one element of a layer's output was "noise in all elements, of the size that BF16 arithmetic makes there"."""
    answer = _answer(engine, _dump(engine, kind, "blk.*.l_out,logits", "blk.1.ffn_out"))
    assert answer.law.startswith("at position 3")
    assert _LAW in answer.law
    assert not answer.rounds


@pytest.mark.parametrize("kind", _STATED)
def test_nan_in_one_record_alone_blames_no_operation(engine: Faulty, kind: str) -> None:
    """Where what is made from it agrees, the record is wrong and not the operation, in a stated arithmetic as in float32."""
    dump = _dump(engine, kind, "blk.*.{ffn_inp,ffn_out,l_out}")
    rows = dump.points["blk.2.ffn_out"]
    values = rows.values.copy()
    values[3, 5] = np.nan
    stats = {name: each for name, each in rows.stats.items() if name == "n"}
    dump = replace(dump, points={**dump.points, "blk.2.ffn_out": replace(rows, values=values, stats=stats, sketch=None)})
    answer = _answer(engine, dump)
    assert answer.law.startswith("at position 3")
    assert _LAW in answer.law
    assert [suspect.checkpoint for suspect in answer.suspects] == ["blk.2.ffn_out"]


def test_only_points_that_are_in_question_are_asked_for(engine: Faulty) -> None:
    """Queries that are wrong lie behind a layer that agrees: the norm and the queries before RoPE tell, nothing else."""
    steps = [
        replace(step, op=lambda *inputs, own=step.op, **params: np.roll(own(*inputs, **params), 3, axis=1) * np.float32(0.7))
        if step.makes == "blk.2.q_rope"
        else step
        for step in engine.right
    ]
    dump = engine.dump(RIGHT, PROMPT, points="blk.*.{q_rope,l_out}", size=1000, steps=steps, bare=False)
    answer = explain(dump, engine.model, replace(PATIENT, budget=2.0))
    assert answer.next == "blk.2.attn_norm,blk.2.q"
