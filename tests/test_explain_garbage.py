"""Memory that was read as floats has no explanation."""

import numpy as np
import pytest
from explaining import PROMPT, STEPS, edited, names
from planted import Faulty

from engine.backend import Array
from parity.explain.explain import ExplainOptions, explain


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_garbage_of_any_size_has_no_law_and_no_lead(engine: Faulty, size: float) -> None:
    """Memory that was read as floats: all tiny numbers are near 0 times the right ones, and of an error of 10^40 nearly all disappears with
    whatever makes usual values; neither says anything."""
    garbage = np.random.default_rng(3).normal(0, size, (len(PROMPT), 1024)).astype(np.float32)
    explanation = explain(
        edited(engine, "output_norm", lambda x: garbage[: len(x), : x.shape[1]]), engine.model, ExplainOptions()
    )
    assert (explanation.law, [lead for lead in explanation.leads if lead.removed is not None], names(explanation)) == (
        "",
        [],
        [],
    )


def test_no_pairs_are_tried_where_nothing_recorded_is_a_number(engine: Faulty) -> None:
    """NaN at one position: one fault alone would make that, so that single faults are all that is tried."""

    def empty(x: Array) -> Array:
        return np.where(np.arange(len(x))[:, None] == 1, np.float32(np.nan), x)

    dump = edited(engine, "blk.1.attn_out", empty, points="blk.*.{q,k,v,attn_out,l_out}")
    explanation = explain(dump, engine.model, STEPS)
    assert names(explanation) == []
    assert explanation.law.startswith("at position 1 alone every recorded element is NaN")
    assert explanation.variants < 1500, "pairs were tried"
