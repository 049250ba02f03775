"""Two dumps that say nothing of the graph: where a point outside the vocabulary stands in a file acquits nothing."""

import pytest
from explaining import PROMPT, RIGHT
from msgspec.structs import replace
from planted import Faulty, Planted
from recorded import F32

from checkpoints.record import Dump
from parity.diff.compare import compare


def without_graph(dump: Dump, *, beside: bool) -> Dump:
    """A dump whose header has no dataflow; `beside`: a copy of V stands behind the rotated keys, under a name that is no point's."""
    assert dump.header is not None
    points = {}
    for name, rows in dump.points.items():
        points[name] = rows
        if beside and name.endswith("k_rope"):
            other = name.replace("k_rope", "Vcur")
            points[other] = replace(dump.points[name.replace("k_rope", "v")], point=other)
    return replace(dump, header=replace(dump.header, dataflow=None), points=points)


@pytest.mark.parametrize("beside", [False, True])
def test_a_point_that_stands_behind_another_is_not_made_from_it(engine: Faulty, *, beside: bool) -> None:
    """Queries and keys are not rotated, and all that is made from them is wrong; that V, which stands next in the file, agrees says
    nothing of them.
    """
    faulty = engine.dump(Planted((("rope-missing", {"at": ("q_rope", "k_rope")}, None),)), PROMPT, points="*", bare=False)
    right = engine.dump(RIGHT, PROMPT, points="*", bare=False)
    verdict = compare(without_graph(faulty, beside=beside), without_graph(right, beside=beside), F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.q_rope"
    assert verdict.record_faults == ()


def test_what_stands_before_a_point_is_not_said_to_be_its_input(engine: Faulty) -> None:
    """Where a point outside the vocabulary alone is wrong, no operation is blamed: what it is made from is not known."""
    right = without_graph(engine.dump(RIGHT, PROMPT, points="*", bare=False), beside=True)
    name = "blk.0.Vcur"
    wrong = replace(right.points[name], values=-right.points[name].values)
    verdict = compare(replace(right, points={**right.points, name: wrong}), right, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == name
    assert verdict.operation == ""
