"""The free diagnosis: what the positions at which the first diverging point is wrong say about the cause."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import Pattern
from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM, parse

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Evidence:
    """The first diverging point's records of one sequence that nothing upstream explains, by position, [P].

    `step` and `decode` are our side's. `nonfinite`: our side has NaN or infinities there that the reference has not.
    `leak`: attention gives weight to later positions. `drifted`: the error grew without a jump.
    `settled`: everything this point is made from was recorded and agrees. `embedded`: the embedding was and does.
    `token` is the text at the first failing position.
    """

    point: str
    position: Ints
    failed: Bools
    step: Ints
    decode: Bools
    nonfinite: bool = False
    leak: bool = False
    drifted: bool = False
    settled: bool = False
    embedded: bool = False
    token: str | None = None


_ATTENTION_INSIDE = ("kq", "kq_soft_max", "kqv_out")
_PLAIN = {
    "attn_norm": "the norm before attention: its weight or its epsilon",
    "q": "the query projection: its weight (transposed, another layer's) or its bias",
    "k": "the key projection: its weight (transposed, another layer's) or its bias",
    "v": "the value projection: its weight (transposed, another layer's) or its bias",
    "q_norm": "the query norm: its weight or its epsilon",
    "k_norm": "the key norm: its weight or its epsilon",
    "q_rope": "RoPE of the queries: pairs (halves or neighbours), base, position",
    "k_rope": "RoPE of the keys: pairs (halves or neighbours), base, position",
    "k_read": "the cache: which key rows were written and read",
    "v_read": "the cache: which value rows were written and read",
    "kq": "the query-key product: which key head a query head uses, or the cache",
    "kq_soft_max": "scale, mask or softmax",
    "kqv_out": "the sum over values: which value head a query head uses, the heads' order, or the cache",
    "attn_out": "attention's output projection: its weight or its bias",
    "ffn_inp": "the residual addition after attention",
    "ffn_norm": "the norm before the feed-forward: its weight or its epsilon",
    "ffn_gate": "the gate projection: its weight, or gate and up swapped",
    "ffn_up": "the up projection: its weight, or gate and up swapped",
    "ffn_swiglu": "the activation: SiLU of the gate, times up",
    "ffn_out": "the down projection: its weight",
    "l_out": "the residual addition after the feed-forward",
    EMBD: "the embedding table: its dequantisation, its scale or its rows",
    OUTPUT_NORM: "the last norm: its weight or its epsilon",
    LOGITS: "the output matrix (tied to the embedding or not), its bias or a soft cap",
}


def operation(point: str) -> str:
    """What the operation that makes `point` may have wrong, in words; empty for a node outside the vocabulary."""
    return _PLAIN.get(parse(point).kind, "")


def diagnose(seen: Evidence) -> Pattern | None:
    """The first pattern that fits; None where no record failed."""
    if not seen.failed.any():
        return None
    where = _where(seen)
    if seen.nonfinite:
        return Pattern(
            "nonfinite", f"NaN or infinity, {where}: an overflow, a division by zero, or memory that was never written"
        )
    if seen.leak:
        return Pattern("causal-mask", "attention gives weight to later positions: the causal mask is missing")
    kind = parse(seen.point).kind
    if seen.point == EMBD:
        return _embedding(seen)
    if decoding := _decode_only(seen):
        return decoding
    if not seen.settled and kind not in (OUTPUT_NORM, LOGITS) and _all_but_last(seen):
        return Pattern("causal-mask", "wrong at every position but the last of the pass: the causal mask is missing or shifted")
    if seen.drifted:
        return Pattern("drift", "the error grew without a jump: precision rather than one wrong operation")
    shape = _shape(seen)
    if seen.settled and (kind not in _ATTENTION_INSIDE or shape is None or shape.code.startswith("from-position")):
        likely = operation(seen.point)
        return Pattern("operation", f"{where}, and its inputs agree" + (f": {likely}" if likely else ""))
    if seen.point == LOGITS:
        return Pattern("output-matrix", f"{where}: the last norm or {_PLAIN[LOGITS]}")
    if seen.point == OUTPUT_NORM and shape is not None and shape.code == "from-position-0":
        return Pattern("output-norm", f"{where}: a layer after the last that was recorded, or the last norm")
    return shape


def _where(seen: Evidence) -> str:
    failing = seen.position[seen.failed]
    if len(seen.position) == 1:
        return f"wrong at position {failing[0]}, the only one recorded"
    if len(failing) == len(seen.position):
        return "wrong at every position"
    if bool(seen.failed[np.searchsorted(seen.position, failing[0]) :].all()):
        right = seen.position[0] if len(seen.position) - len(failing) == 1 else f"{seen.position[0]} to {_before(seen)}"
        return (
            f"position {right} is right, {failing[0]} and later are wrong"
            if failing[0] != seen.position[-1]
            else (f"only the last position ({failing[0]}) is wrong")
        )
    listed = ", ".join(map(str, failing[:6].tolist())) + (", …" if len(failing) > 6 else "")
    return f"wrong at {len(failing)} of {len(seen.position)} positions ({listed})"


def _before(seen: Evidence) -> int:
    """The last right position before the first wrong one."""
    return int(seen.position[int(seen.failed.argmax()) - 1])


def _embedding(seen: Evidence) -> Pattern:
    if seen.failed.all() and len(seen.failed) > 1:
        return Pattern("embedding", f"the embedding is wrong at every position: {_PLAIN[EMBD]}")
    token = f" of token {seen.token!r}" if seen.token is not None else ""
    return Pattern("embedding-row", f"{_where(seen)}: the embedding row{token}, or another token id")


def _decode_only(seen: Evidence) -> Pattern | None:
    prefill, decode = ~seen.decode, seen.decode
    if not prefill.any() or not decode.any() or seen.failed[prefill].any():
        return None
    first = int(seen.position[seen.failed][0])
    return Pattern(
        "decode", f"prefill is right, decode is wrong from position {first} on: the KV cache, or the position given to RoPE"
    )


def _all_but_last(seen: Evidence) -> bool:
    """Whether in each pass of more than one position all are wrong but the last."""
    passes = [seen.step == step for step in np.unique(seen.step[~seen.decode])]
    long = [chosen for chosen in passes if chosen.sum() > 2]
    return bool(long) and all(bool(seen.failed[chosen][:-1].all()) and not seen.failed[chosen][-1] for chosen in long)


def _shape(seen: Evidence) -> Pattern | None:
    failing = seen.position[seen.failed]
    where = _where(seen)
    if len(seen.position) == 1:
        return Pattern("one-position", f"{where}: record more positions to see a pattern")
    first = int(failing[0])
    tail = bool(seen.failed[int(seen.failed.argmax()) :].all())
    if tail and seen.failed.all():
        code = "from-position-0" if first == 0 else "every-position"
        return Pattern(code, f"{where}: V, the output projection, FFN, a norm or weight, or no causal mask")
    if tail and _before(seen) == 0 and (len(failing) > 1 or first == 1):
        return Pattern("from-position-1", f"{where}: Q, K, RoPE, the attention's scale or its mask")
    if tail and len(failing) > 1:
        return _tail(seen, first, where)
    if not seen.failed[1:].any():
        return Pattern("first-position", f"only position {first} is wrong: BOS, or what position 0 is taken for")
    if seen.embedded:
        said = "embd is right there: attention (Q, K, RoPE, mask) at these positions, or an error that is under the limit elsewhere"
        return Pattern("single-positions", f"{where}; {said}")
    token = f" ({seen.token!r})" if seen.token is not None else ""
    return Pattern("single-positions", f"{where}: the embedding row of that token{token}, or another token id")


def _tail(seen: Evidence, first: int, where: str) -> Pattern:
    """Wrong from a position above 1 on."""
    at = int(seen.failed.argmax())
    if seen.step[at] != seen.step[at - 1]:
        return Pattern("chunk", f"{where}: a new pass begins there: what the cache kept of the chunk before, or its positions")
    if first >= 16 and first % 16 == 0 and first - _before(seen) == 1:
        size = first & -first
        return Pattern("chunk", f"{where}: {first} is a multiple of {size}: the edge of a chunk, a tile or a window")
    return Pattern("from-position-n", f"{where}: a limit at {first}: a window, the cache's size, or how far RoPE was scaled")
