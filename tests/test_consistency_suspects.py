"""What `parity consistency` suspects of two dumps that differ: by the size of an error, by where it is largest, by what a layer has."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from cli import Cli

from parity.consistency.ways import portions_text

FIRST = 4  # positions of the first pass
COUNT = 9


def _written(path: Path, points: Mapping[str, np.ndarray], first: int) -> Path:
    lines = [
        {"checkpoint": name, "token_idx": at, "step": max(0, at - first + 1), "values": values[at].tolist()}
        for name, values in points.items()
        for at in range(COUNT)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def _off(nmse: float, *positions: int) -> np.ndarray:
    """A factor for each position that makes an error of this size at these."""
    factors = np.ones((COUNT, 1))
    factors[list(positions)] += nmse**0.5
    return factors


LATER = range(FIRST, COUNT)
CASES = {
    "rounding behind a table of F16": ({"logits": _off(3e-9, 0, 5)}, "batch size", "looked up in a table of F16 (ggml's GELU)"),
    "a kernel for one row": (
        {"logits": _off(1e-3, 0, *LATER)},
        "batch size",
        "a kernel depends on the number of tokens (first at logits",
    ),
    "a fault behind such rounding": (
        {"logits": _off(3e-9, 0) * _off(1e-2, *LATER) * _off(1e-2, 6)},
        "cache, positions or mask",
        "right within the first portion, wrong after it (worst at logits, position 6)",
    ),
    "a state that is lost": (
        {"blk.0.ssm_in": _off(0.0), "blk.0.ssm_out": _off(0.1, *LATER), "blk.0.l_out": _off(0.01, *LATER)},
        "recurrent state, or cache, positions or mask",
        "what its recurrence or its convolution, if it has one, keeps of earlier passes is lost",
    ),
    "experts' points of a layer whose attention was not recorded": (
        {"blk.0.attn_norm": _off(0.0), "blk.0.ffn_moe_out": _off(0.1, *LATER), "blk.0.l_out": _off(0.01, *LATER)},
        "recurrent state, or cache, positions or mask",
        "else cache, positions or mask (first at blk.0.ffn_moe_out, position 4)",
    ),
    "an error as small as a table's, after the first pass alone": (
        {"logits": _off(1e-8, *LATER)},
        "batch size, cache, positions or mask",
        "or what is kept of earlier passes is as little off",
    ),
    "a layer of which only the output is known": (
        {"blk.0.l_out": _off(0.01, *LATER)},
        "cache, positions or mask",
        "dumps of q_rope, k_rope, kq_soft_max and kqv_out would show which of them",
    ),
    "a small error of a cache": ({"blk.0.k_read": _off(1e-8, *LATER)}, "cache", "keys or values of earlier passes"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_suspected_fits_the_error(case: str, parity: Cli, tmp_path: Path) -> None:
    """Noise behind GELU's table is not called a wrong kernel, hides no larger error after it, and layers without attention have a state."""
    factors, suspect, reason = CASES[case]
    draw = np.random.default_rng(3)
    right = {name: draw.standard_normal((COUNT, 64)) for name in factors}
    whole = _written(tmp_path / "whole.jsonl", right, COUNT)
    steps = _written(tmp_path / "steps.jsonl", {name: right[name] * factors[name] for name in right}, FIRST)
    code, answer = parity.json("consistency", whole, steps, "--compute", "f32")
    (check,) = answer["checks"]
    assert (code, check["suspect"]) == (1, suspect)
    assert reason in check["reason"]


def test_portions_read_as_counts() -> None:
    """Passes of equal size are counted, whatever stands before them; of many different ones the ends and their number are said."""
    shown = {
        (9,): "9",
        (1,) * 9: "9 × 1",
        (5, 1): "5 + 1",
        (4, 1, 1, 1, 1, 1): "4 + 5 × 1",
        (1, 2, 3, 4, 5): "1 + … + 5, 5 passes",
    }
    assert {portions: portions_text(portions) for portions in shown} == shown
