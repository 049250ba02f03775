"""A chain of records in another order (q and q_rope as halves) blames no operation; an operation that gives another order is blamed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import STEPS
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.points import parse
from checkpoints.record import Dump
from engine.backend import Array
from engine.graph import Step
from parity.explain.explain import explain
from reference.client import Reference
from reports.explanation import lines

pytestmark = pytest.mark.slow
_CHAIN = ("q", "q_rope", "k", "k_rope")
_CACHE = (*_CHAIN, "k_read")


@pytest.fixture
def engine(reference: Reference, small_model: Callable[..., Path]) -> Faulty:
    model = small_model("command-r")
    return Faulty(model, reference.graph(model))


def _halves(engine: Faulty) -> Callable[[Array], Array]:
    size = engine.transformer.hp.head_size
    return lambda x: x.reshape(*x.shape[:-1], -1, size // 2, 2).swapaxes(-1, -2).reshape(x.shape)


def _dump(engine: Faulty, steps: list[Step] | None = None, faults: Planted | None = None) -> Dump:
    tokens = tokens_of(engine.model, 9, seed=3)
    return engine.dump(faults or Planted(()), tokens, points="*", size=1 << 20, steps=steps)


def _recorded(dump: Dump, change: Callable[[Array], Array], chain: tuple[str, ...] = _CHAIN) -> Dump:
    kept = {
        name: replace(rows, values=change(rows.values)) if parse(name).kind in chain else rows
        for name, rows in dump.points.items()
    }
    return replace(dump, points=kept)


def _few(dump: Dump) -> Dump:
    """The dump with ten values of each row, and nothing that is known of the others."""
    cut = {
        name: replace(
            rows,
            values=rows.values[:, :10],
            counts=np.minimum(rows.counts, 10),
            stats={},
            sketch=None,
            shapes=((),) * len(rows),
        )
        for name, rows in dump.points.items()
    }
    return replace(dump, points=cut)


def test_a_chain_of_records_in_another_order_blames_no_operation(engine: Faulty) -> None:
    """Q and K of a right engine, before and after RoPE, are halves: the scores agree, so one sentence says that of all the records."""
    answer = explain(_recorded(_dump(engine), _halves(engine)), engine.model, STEPS)
    assert (answer.causes, answer.placed, answer.law) == ((), None, "")
    assert {parse(suspect.checkpoint).kind for suspect in answer.suspects} == set(_CHAIN)
    assert {suspect.shows for suspect in answer.suspects} == {"halves where llama.cpp has neighbours"}
    assert next(suspect.agreeing for suspect in answer.suspects if suspect.checkpoint == "blk.0.q") == ("blk.0.kq",)
    text = " ".join(line.plain for line in lines(answer, 1000))
    assert text.count("halves where llama.cpp has neighbours") == 1
    assert "operation is wrong" not in text


@pytest.mark.parametrize("few", [False, True])
def test_a_right_engine_with_halves_has_no_fault(engine: Faulty, few: bool) -> None:
    """Q and K as halves, in the cache as well, whole rows or ten values of each: no fault, and one sentence says how they are recorded."""
    dump = _recorded(_dump(engine), _halves(engine), _CACHE)
    answer = explain(_few(dump) if few else dump, engine.model, STEPS)
    assert answer
    assert {parse(suspect.checkpoint).kind for suspect in answer.suspects} == set(_CACHE)
    text = " ".join(line.plain for line in lines(answer, 1000))
    assert text.count("halves where llama.cpp has neighbours") == 1


def test_a_fault_beside_ten_values_of_halves_is_named(engine: Faulty) -> None:
    """What a later layer does wrong is found beside ten values of each row, Q and K as halves among them."""
    wrong = Planted((("branch-missing", {"at": ("l_out",)}, (2,)),))
    answer = explain(_few(_recorded(_dump(engine, faults=wrong), _halves(engine), _CACHE)), engine.model, STEPS)
    assert [cause.named.layers for cause in answer.causes] == [(2,)]


def test_records_that_are_wrong_alone_in_several_layers_are_one_sentence(engine: Faulty) -> None:
    """Two layers' norms are recorded with another number added: the layers stand in one sentence, as in `--points`."""
    dump = _dump(engine)
    wrong = {f"blk.{layer}.attn_norm": dump.points[f"blk.{layer}.attn_norm"] for layer in (1, 2)}
    shifted = {name: replace(rows, values=rows.values + np.float32(0.5)) for name, rows in wrong.items()}
    answer = explain(replace(dump, points={**dump.points, **shifted}), engine.model, STEPS)
    assert {suspect.checkpoint for suspect in answer.suspects} == set(wrong)
    text = " ".join(line.plain for line in lines(answer, 1000))
    assert text.count("alone differs") == 1
    assert "blk.{1..2}.attn_norm alone differs: blk.{1..2}.q and" in text
    assert "what differs first, blk.1.attn_norm" in text


def test_a_fault_beside_a_chain_in_another_order_is_named(engine: Faulty) -> None:
    """What the engine does wrong in a later layer is found as if those records were not there."""
    wrong = Planted((("branch-missing", {"at": ("l_out",)}, (2,)),))
    answer = explain(_recorded(_dump(engine, faults=wrong), _halves(engine)), engine.model, STEPS)
    assert [cause.named.layers for cause in answer.causes] == [(2,)]
    assert "blk.0.q" in {suspect.checkpoint for suspect in answer.suspects}


@pytest.mark.parametrize("chain", [("blk.1.q",), ("blk.1.q", "blk.1.k")])
def test_an_operation_that_gives_another_order_is_blamed(engine: Faulty, chain: tuple[str, ...]) -> None:
    """Queries that the engine itself puts into another order before RoPE make other scores: the record is not to blame."""
    change = _halves(engine)

    def changed(step: Step) -> Step:
        return replace(step, op=lambda *inputs, **params: change(step.op(*inputs, **params)))

    steps = [changed(step) if step.makes in chain else step for step in engine.right]
    answer = explain(_dump(engine, steps), engine.model, STEPS)
    assert answer.suspects == ()
    assert answer.first is not None
    assert answer.first.checkpoint == "blk.1.q"
    assert answer.causes or (answer.placed is not None and answer.placed.operations == ("blk.1.q",))
