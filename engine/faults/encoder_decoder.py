"""Faults of encoder–decoders: what a decoder reads of its encoder, its cross-attention, and biases by relative position."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from ..backend import Array, module_of
from ..graph import ENCODED, PASSES, Step, Weight, name_of
from ..inapplicable import NotApplicable
from ..lift.inputs import sees_encoded
from .base import Fault, Parameters, Steps, with_parameters
from .edits import Then, WithInput, only, require

_CROSS = "cross_attn_"  # in the names of the weights of cross-attention


def _before_norm(_encoded: Array, before: Array) -> Array:
    return before


def _unnormed(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if len(step.reads) != 2:
        raise NotApplicable("the encoder ends in no norm")
    return replace(step, op=_before_norm)


# In another order they are the same to cross-attention; zeros give what `cross-attention-missing` gives.
_ROWS: dict[str, Callable[[Array], Array]] = {
    "its last row alone, at every position": lambda rows: rows * 0 + rows[-1:],
    "as columns: [D, E] taken for [E, D]": lambda rows: rows.T.copy().reshape(rows.shape),
}


def _other_rows(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return replace(step, op=Then(step.op, _ROWS[parameters["rows"]]))


_SEES: dict[str, Callable[[int, int], Array]] = {
    "rows up to its own position only": lambda t, e: np.arange(e)[None, :] <= np.arange(t)[:, None],
    "all rows but the last": lambda t, e: np.arange(e)[None, :] + np.zeros((t, 1)) < e - 1,
    "all rows but the first": lambda t, e: np.arange(e)[None, :] + np.zeros((t, 1)) > 0,
    "the first row only": lambda t, e: np.arange(e)[None, :] + np.zeros((t, 1)) < 1,
}


def _masked(step: Step, right: Steps, parameters: Parameters) -> Step:
    mask = next((at for at, read in enumerate(step.reads) if _makes_mask(right, name_of(read))), None)
    if mask is None:
        return step  # it sees no encoder's rows
    seen = _SEES[parameters["seen"]]

    def hidden(rows: Array) -> Array:
        xp = module_of(rows)
        return xp.where(xp.asarray(seen(*rows.shape)), rows, np.float32(-np.inf))

    return replace(require(step, "SOFT_MAX"), op=WithInput(step.op, mask, hidden))


def _makes_mask(right: Steps, name: str) -> bool:
    return name in right and right[name].op is sees_encoded


_MATRICES: dict[str, Callable[[str], str]] = {
    "the keys' matrix for the values": lambda name: name.replace(f"{_CROSS}v", f"{_CROSS}k"),
    "the values' matrix for the keys": lambda name: name.replace(f"{_CROSS}k", f"{_CROSS}v"),
    "the matrices of keys and values exchanged": lambda name: name.replace(
        *((f"{_CROSS}k", f"{_CROSS}v") if f"{_CROSS}k" in name else (f"{_CROSS}v", f"{_CROSS}k"))
    ),
    "self-attention's matrices for keys and values": lambda name: name.replace(_CROSS, "attn_"),
}


def _other_matrix(step: Step, right: Steps, parameters: Parameters) -> Step:
    name = _cross_weight(step, "k", "v")
    if name is None:
        return step
    other = _MATRICES[parameters["read"]](name)
    if not any(other in step.weights for step in right.values()):
        raise NotApplicable(f"no step reads {other}")
    return replace(step, weights=(other, *step.weights[1:]))


def _cross_weight(step: Step, *kinds: str) -> str | None:
    """The cross-attention's matrix that a step reads; None if it reads none of these kinds."""
    first: Weight = step.weights[0] if step.weights else None
    return first if isinstance(first, str) and any(f"{_CROSS}{kind}." in first for kind in kinds) else None


def _branch(step: Step, right: Steps, parameters: Parameters) -> Step:
    crossed = [read for read in step.reads if _is_crossed(right, name_of(read))]
    if len(step.reads) != 2 or len(crossed) != 1:
        return step
    residual = next(read for read in step.reads if read is not crossed[0])
    return only(step, residual if parameters["without"] == "what cross-attention makes" else crossed[0])


def _is_crossed(right: Steps, name: str) -> bool:
    return name in right and _cross_weight(right[name], "o") is not None


def _of_prompt(bias: Array, passes: Array) -> Array:
    """The bias [H, T, S] of the first pass; later passes have none."""
    return bias * (passes == 0)[None, :, None]


def _no_bias(step: Step, right: Steps, parameters: Parameters) -> Step:
    biases = [read for read in step.reads if name_of(read).rpartition(".")[2].startswith("kq_b")]
    if len(step.reads) != 2 or len(biases) != 1:
        return step
    if parameters["where"] == _BEHIND:
        at = step.reads.index(biases[0])
        return replace(step, op=WithInput(step.op, at, _of_prompt, besides=(2,)), reads=(*step.reads, PASSES))
    return only(step, next(read for read in step.reads if read is not biases[0]))


def _within_pass(positions: Array, passes: Array) -> Array:
    """Positions counted from the start of the pass that they belong to: [T]."""
    xp = module_of(positions)
    begins = [positions[passes == number].min() for number in passes.tolist()]
    return positions - xp.asarray(begins)


def _negated(positions: Array) -> Array:
    return -positions


def _other_buckets(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if parameters["how"] == "with the sign of the distance reversed":
        return replace(step, op=WithInput(WithInput(step.op, 0, _negated), 1, _negated))
    if parameters["how"] == _WITHOUT_CACHE:
        return replace(step, op=WithInput(step.op, 0, _within_pass, besides=(2,)), reads=(*step.reads, PASSES))
    return with_parameters(step, bidirectional=not step.params["bidirectional"])


_BEHIND = "in the passes after the first"
_WITHOUT_CACHE = "from the start of each pass: what the cache holds is not counted"
FAULTS = (
    Fault(
        name="encoder-norm-missing",
        kinds=(ENCODED,),
        change=_unnormed,
        what="the decoder reads the encoder's last layer before its final norm",
        symptom="the encoder is right; the decoder is wrong from its first cross-attention on",
        fix="hand over the encoder's output after its norm",
        seen="encoders that return the last hidden state of the loop",
        once=True,
    ),
    Fault(
        name="encoder-rows",
        kinds=(ENCODED,),
        change=_other_rows,
        what="the decoder reads the encoder's rows {rows}",
        symptom="the encoder is right; the decoder is wrong from its first cross-attention on",
        fix="cross-attention reads every row of the encoder's output, in order",
        seen="a buffer that another pass writes to, a matrix that is handed over transposed",
        parameters={"rows": tuple(_ROWS)},
        once=True,
    ),
    Fault(
        name="cross-attention-mask",
        kinds=("SOFT_MAX",),
        change=_masked,
        what="in cross-attention a position sees {seen}",
        symptom="wrong from the first cross-attention on; with a causal mask least at the last positions",
        fix="every position of the decoder sees every row of the encoder, its end token included",
        seen="one attention kernel with one causal mask for both; a length without the end token",
        parameters={"seen": tuple(_SEES)},
    ),
    Fault(
        name="cross-attention-matrices",
        kinds=("MUL_MAT",),
        change=_other_matrix,
        what="cross-attention reads {read}",
        symptom="wrong from the first cross-attention on",
        fix="cross_attn_k and cross_attn_v times the encoder's rows, cross_attn_q times the decoder's",
        seen="names of weights that differ by one word",
        parameters={"read": tuple(_MATRICES)},
    ),
    Fault(
        name="cross-attention-missing",
        kinds=("ffn_inp.add",),
        change=_branch,
        what="the sum after cross-attention lacks {without}",
        symptom="wrong from the first layer on",
        fix="add what cross-attention makes to its input; an encoder's output that is not handed over, all zeros, gives the same",
        seen="decoder-only code that loads an encoder–decoder",
        parameters={"without": ("what cross-attention makes", "the residual")},
    ),
    Fault(
        name="relative-bias-missing",
        kinds=("kq_plus_kq_b",),
        change=_no_bias,
        what="the bias by relative position is not added to the scores {where}",
        symptom="self-attention is wrong in every layer, or in all but the first",
        fix="the first layer's attn_rel_b is the bias of all layers that have none of their own",
        seen="a bias that is added in the layer that has the weight; attention with a cache, without the bias",
        parameters={"where": ("in any pass", _BEHIND)},
    ),
    Fault(
        name="relative-bias-buckets",
        kinds=("BUCKETS",),
        change=_other_buckets,
        what="buckets of relative positions are counted {how}",
        symptom="self-attention is wrong from the second position on; the encoder's at every position",
        fix="an encoder's buckets are of both directions, a decoder's of earlier keys only; the distance is key − query",
        seen="one function for both halves; a decode step whose only query counts as the first",
        parameters={
            "how": (
                "with the sign of the distance reversed",
                "as the other half's: both directions for one, or one for both",
                _WITHOUT_CACHE,
            )
        },
        once=True,
    ),
)
