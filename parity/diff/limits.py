"""How much two right sides may differ: limits by weight type, KV type and arithmetic of both sides, each with its source.

All limits are NMSE, Σ(a−b)²/Σb², of an end-to-end run; a record fails above its limit.
"""

import re
from collections.abc import Mapping, Sequence
from math import inf

from msgspec import Struct

from checkpoints.answers.diff import Limits, RowLimit
from checkpoints.errors import InputError
from checkpoints.points import LOGITS
from checkpoints.record import Header, ModelInfo

EXACT = "exact"
NATIVE = "native"
COMPUTES = ("f32", "tf32", "f16", "bf16", "q8")

# Weight that attention gives to later positions: exactly 0 with a causal mask, whether it consists of -inf, -1e4 or
# larger (exp underflows). ggml's test-backend-ops allows a softmax 1e-6.
FUTURE_MASS = 1e-6


class Floor(Struct, frozen=True):
    """What one property of a side allows: `operations` for every point but the logits."""

    operations: float
    logits: float
    source: str

    def at(self, point: str) -> float:
        """What is allowed at a point."""
        return self.logits if point == LOGITS else self.operations


# Measured: a float32 engine in NumPy against llama.cpp's CPU backend, 24 layers, 36 tokens, F32 weights and KV cache:
# 1e-14 … 7e-13 at every point, logits 2e-13 (a trained model) … 1.2e-11 (0.5 B shape with outlier channels). 512 tokens of text
# reach 2e-11, random ids the limit itself, at single positions (benchmarks/noise.py; `parity.diff.tolerances.noise`).
EXACT_FLOOR = Floor(1e-10, 1e-9, "F32 on both sides: 7e-13, logits 1.2e-11 measured over 24 layers")
# Measured end to end with native weights; llama.cpp rounds activations to the weights' partner type before products.
_WEIGHTS = {
    "f32": EXACT_FLOOR,
    "f16": Floor(1e-5, 3e-5, "F16 weights round activations to F16: 4e-8 an operation, grown over the layers"),
    "bf16": Floor(3e-4, 2e-3, "BF16 weights round activations to 8 bits of mantissa"),
    "quantised": Floor(5e-3, 5e-2, "4- to 8-bit weights round activations to 8 bits: 2e-5 … 3e-4 by layer 5"),
}
_KV = {
    "f32": EXACT_FLOOR,
    "f16": Floor(2e-5, 1e-4, "F16 KV cache"),
    "bf16": Floor(3e-4, 2e-3, "BF16 KV cache: 8 bits of mantissa, as BF16 weights"),
    "quantised": Floor(5e-3, 5e-2, "quantised KV cache: as quantised weights"),
}
# Arithmetic other than f32 on one side; the mantissa that products are rounded to decides.
_COMPUTE = {
    "f64": EXACT_FLOOR,
    "f32": EXACT_FLOOR,
    "tf32": Floor(1e-5, 3e-5, "tf32 has f16's 10 bits of mantissa"),
    "f16": Floor(1e-5, 3e-5, "f16 arithmetic: as F16 weights"),
    "bf16": Floor(3e-4, 2e-3, "bf16 arithmetic: as BF16 weights"),
    "q8": Floor(5e-3, 5e-2, "activations rounded to 8 bits: as quantised weights round them"),
}
# The fast mode on a device against exact mode, the stories model, a prompt and 70 steps on an H200: logits 2e-13 … 6e-13 with
# F32 weights, 1e-7 … 9e-7 where a prefill rounds activations to F16, 5e-6 where to BF16; single points up to 5e-4 (BF16).
_FAST = {
    "f32": Floor(1e-10, 1e-9, "F32 weights: 6e-13 measured"),
    "f16": Floor(
        1e-5, 3e-5, "a prefill rounds activations and unpacked weights to F16: 1e-6 at the layers' outputs, logits 9e-7"
    ),
    "bf16": Floor(3e-4, 2e-3, "a prefill rounds activations to BF16: 1e-4 at the layers' outputs, logits 5e-6 measured"),
}
# The fast mode in --mode native: its prefill and llama.cpp both round activations, and independent errors add. Measured on the
# stories model, all points, an H200: F16 1.6e-5 (7.9e-6 where only llama.cpp rounds); BF16 5e-4 by the fast mode alone.
_BOTH_ROUND = {
    "f16": Floor(3e-5, 6e-5, "the fast mode's prefill and llama.cpp both round activations to F16: 1.6e-5 measured"),
    "bf16": Floor(1.5e-3, 4e-3, "the fast mode's prefill and llama.cpp both round activations to BF16: 5e-4 by ours alone"),
}
# A side of unknown arithmetic may compute in any of these.
_LOOSEST_COMPUTE = _COMPUTE["bf16"]

# An error that grows by more than this over the worst error upstream of it is fresh. Measured on the embedded model, 17
# positions: each known fault planted in layer 3 alone grew at most 3-fold from any point to a later one, 1.6-fold between the
# default points; the smallest fault that was found at all (another epsilon in one norm) stood out 100-fold.
JUMP = 20.0
# NMSE: 8-bit activations cost up to 5e-3 end to end, at the first products of right engines 8e-3 at most (benchmarks/right_engines.py):
# above twice that, in round numbers, nothing is rounding.
LARGEST_ROUNDING = 0.02
# NMSE after ggml's GELU, whose argument and result are rounded to float16: a right engine with a GELU of its own is up to 3e-7 off at
# the operation (parity/diff/tolerances/truth.py). At the default points of the small gemma3, gemma3n and gemma4 of random weights, six
# prompts each of 4 to 14 tokens, right engines stayed below 5e-7 in sixteen of eighteen runs and reached 3.1e-6 in the worst (gemma4):
# such a run is a divergence with a note, since a fault can be as small. Where float64 is asked (--model) it decides instead.
TABLE = 1e-6
# The factor by which lower arithmetic's error may grow over the table of limits from layer to layer. Right engines with rounded products
# and activations were up to 3.1 times over it at inner points of six layers of random weights, and up to 11.4 times where ten values of a
# row were recorded (benchmarks/right_engines.py), though nothing jumped: twice the latter, in round numbers.
GROWTH = 25.0
# Where the arithmetic is unknown, the noise of the points before is the measure: more than this times it is no noise.
# A right float32 run spans a factor of 70 from its first computed point to its last (1e-14 … 7e-13).
ASSUMED_JUMP = 1000.0


def require_tolerance(tolerance: float) -> None:
    """Raises InputError if it is not a finite number ≥ 0."""
    if not 0 <= tolerance < inf:
        raise InputError(
            f"--tolerance must be 0 or more and finite, not {tolerance}.", "Write e.g. --tolerance 1e-6.", code="tolerance"
        )


def limits(ours: Header | None, ref: Header | None, *, compute: str | None = None, tolerance: float | None = None) -> Limits:
    """The limits for two sides with these headers; the loosest property of either decides.

    Args:
        compute: arithmetic of our side, if its header does not state it (`--compute`).
        tolerance: one limit for everything instead (`--tolerance`).

    Raises:
        InputError: `compute` is not in `COMPUTES`; `tolerance` is not a number ≥ 0.
    """
    if compute is not None and compute not in COMPUTES:
        raise InputError(f"--compute {compute!r} is not known.", f"Use one of {', '.join(COMPUTES)}.", code="compute")
    if tolerance is not None:
        require_tolerance(tolerance)
        return Limits(tolerance, tolerance, "--tolerance")
    sides = [side for side in (ours, ref) if side is not None]
    floors = [EXACT_FLOOR]
    if common_mode(ours, ref) != EXACT:
        floors += [_WEIGHTS[kind] for side in sides for kind in _families(side.model)]
        if ours is not None and ours.source == "engine" and ours.compute in _BOTH_ROUND:
            floors.append(_BOTH_ROUND[ours.compute])
    floors += [_KV[family(side.kv_type)] for side in sides if side.kv_type]
    computes = [compute or (ours.compute if ours else ""), ref.compute if ref else ""]
    known = [_COMPUTE[name.lower()] for name in computes if name.lower() in _COMPUTE]
    assumed = len(known) < len(computes)
    floors += known + [_LOOSEST_COMPUTE] * assumed
    loosest = max(floors, key=lambda floor: floor.operations)
    source = loosest.source
    if assumed:
        source = "assumed: one side does not say what it computes in (--compute f32 judges exactly)"
    return Limits(loosest.operations, loosest.logits, source, assumed)


def lowest(nmse: float, logits: float) -> str:
    """The most precise arithmetic whose limits hold for these errors, of the logits and of everything else; empty if none's do."""
    return next(
        (
            name
            for name in ("f32", "f16", "bf16", "q8")
            if nmse <= _COMPUTE[name].operations and logits <= _COMPUTE[name].logits
        ),
        "",
    )


def fast_floor(file_type: str) -> Floor:
    """How much the engine's fast mode may differ from exact mode, by the file's weight type."""
    return _FAST[{"f32": "f32", "bf16": "bf16"}.get(family(file_type), "f16")]


def _families(model: ModelInfo) -> list[str]:
    """The families of the matrices' types; if those are not known, the family of the file type, which only names a mixture."""
    if model.weights:
        return [kind if kind in _WEIGHTS else "quantised" for kind in model.weights.split()]
    return [family(model.file_type)] if model.file_type else []


def common_mode(ours: Header | None, ref: Header | None) -> str:
    """The mode of a comparison: exact only if one side says so and the other does not contradict; empty if neither says anything."""
    modes = {side.mode for side in (ours, ref) if side is not None and side.mode}
    return modes.pop() if len(modes) == 1 else (NATIVE if modes else "")


def family(name: str) -> str:
    """The family of a weight or cache type: f32, f16, bf16, or quantised ("Q4_K_M", "MOSTLY_F16", "q8_0")."""
    text = name.lower()
    if re.search(r"bf16", text):
        return "bf16"
    if re.search(r"(^|_)f16", text):
        return "f16"
    return "f32" if re.search(r"f32", text) else "quantised"


def measured_by_point(points: Mapping[str, float], usual: Limits, source: str, rows: Sequence[RowLimit] = ()) -> Limits:
    """Limits measured for each point, none below the usual ones; points that were not measured have the largest of the others.

    Args:
        rows: records with limits of their own.
    """
    least = {name: max(limit, usual.at(name)) for name, limit in points.items()}
    others = [limit for name, limit in least.items() if name != LOGITS]
    return Limits(
        max(others, default=usual.operations),
        least.get(LOGITS, usual.logits),
        f"measured: {source}",
        points=least,
        rows=tuple(rows),
    )
