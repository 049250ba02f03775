"""A diagnosis without further computing: what the positions at which the first diverging point is wrong say about the cause."""

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.answers.diff import Pattern
from checkpoints.distinct import distinct
from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM, parse
from reports.sentences import ARITHMETIC

from ..measured.dataflow import Flow, Stretch
from ..measured.operations import CHOICES, FAR, recurrent, suspects

_UNMASKED = "attention (every position sees all others here: Q, K, V, scale, bias of positions)"
_NAMED = 4  # points of a stretch that are named one by one

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Evidence(Struct, frozen=True):
    """The first diverging point's records of one sequence that nothing upstream explains, by position, [P].

    `step` and `decode` are our side's. `nonfinite`: our side has NaN or infinities there that the reference does not have;
    `reference_broken`: the reference has some, and ours has none, or the same.
    `leak`: attention gives weight to later positions. `drifted`: the error grew without a jump.
    `settled`: everything that this point is made from was recorded and agrees; `embedded`: the embedding was recorded and agrees.
    `law`: how the wrong values follow from the reference's, if one sentence says it.
    `differs`: how far off the wrong rows are (`operations.FAR`, NEAR, SOME or BEHIND). `token` is the text at the first failing position.
    `stretch` is what lies between the point and the points before it, None if that is not known; `stated`: our side's arithmetic, if
    that is stated; `alike`: the error has the same size at all positions, right ones included; `gradual`: it grows over the limit, and
    the positions before are nearly as wrong; `unclear`: not all positions within the limit are clearly more right than the others.
    """

    point: str
    flow: Flow
    stretch: Stretch | None
    position: Ints
    failed: Bools
    step: Ints
    decode: Bools
    nonfinite: bool = False
    reference_broken: bool = False
    leak: bool = False
    drifted: bool = False
    settled: bool = False
    embedded: bool = False
    token: str | None = None
    alike: bool = False
    gradual: bool = False
    zero: bool = False
    stated: str = ""
    law: str = ""
    differs: str = FAR
    unclear: bool = False


def diagnose(seen: Evidence) -> Pattern | None:
    """The first pattern that fits, certain ones before likely ones; None if no record failed."""
    if not seen.failed.any():
        return None
    if (pattern := _without_numbers(seen)) is not None:
        return pattern
    if seen.leak:
        return Pattern("causal-mask", "attention gives weight to later positions: the causal mask is missing")
    if seen.alike:
        why = "a lower precision than the limit assumes (--compute q8, bf16, f16)"
        if seen.stated in ARITHMETIC and seen.stated:
            why = f"an arithmetic that costs more than our own {ARITHMETIC[seen.stated]} (digits that are cut off?), or a small fault"
        return Pattern("precision", f"{_where(seen)}, but the error is equally large at all positions: {why}")
    if seen.point == EMBD:
        return _embedding(seen)
    if (pattern := _decode_only(seen) or _all_but_last(seen)) is not None:
        return pattern
    if seen.drifted:
        return Pattern("drift", f"the error grew without a jump{_of_drift(seen.stated)}")
    shape = _shape(seen)
    from_one_on = shape is None or shape.code.startswith("from-position")
    if seen.settled and (from_one_on or not _attends(seen)):
        everywhere = seen.unclear or bool(seen.failed.all())
        likely = seen.law
        if not likely and seen.stretch is not None:
            likely = suspects(seen.flow, seen.stretch.nodes, seen.differs, everywhere=everywhere)
        return Pattern("operation", f"{_where(seen)}, and its inputs agree" + (f": {likely}" if likely else ""))
    return _after_the_layers(seen, shape)


def _of_drift(stated: str) -> str:
    """What an error may be that grew over its limit slowly, if an arithmetic is `stated`, which the limit allows for, or none."""
    if not stated or stated not in ARITHMETIC:
        return ": precision rather than one wrong operation"
    return f", beyond what {ARITHMETIC[stated]} arithmetic costs: small faults, here or before, or another arithmetic than is stated"


def _without_numbers(seen: Evidence) -> Pattern | None:
    """The pattern of values that are not finite, or all 0: nothing can be measured on them."""
    if seen.reference_broken:
        places = _positions(seen)
        sentence = f"the reference is not finite here, at {places}: nothing can be judged at this point or after it"
        return Pattern("reference-nonfinite", sentence)
    if seen.nonfinite:
        causes = "an overflow, a division by zero, or memory that was never written"
        return Pattern("nonfinite", f"NaN or infinity, {_where(seen)}: {causes}")
    if seen.zero:
        norm = seen.stretch is not None and any("NORM" in op for op in seen.flow.operations(seen.stretch.nodes))
        infinite = "a norm of a row with an infinity that was not recorded, or memory that was never written"
        return Pattern("zero", f"all values are 0, {_where(seen)}: {infinite if norm else 'memory never written'}")
    return None


def _after_the_layers(seen: Evidence, shape: Pattern | None) -> Pattern | None:
    """The pattern of an error at the points after the last layer, whose operations are few enough to be named."""
    if seen.point == LOGITS and not _in_layers(seen) and (shape is None or shape.code in _EVERYWHERE):
        likely = "the output matrix"
        if LOGITS in seen.flow.whole.computations:
            likely = suspects(seen.flow, (LOGITS,), seen.differs)
        return Pattern("output-matrix", f"{_where(seen)}: the last norm or {likely}, a soft cap")
    if seen.point == LOGITS and seen.flow.names == (LOGITS,) and shape is not None and shape.code in _EVERYWHERE[:2]:
        return Pattern(shape.code, f"{_where(seen)}: anything from the embedding on: nothing in front of it was recorded")
    if seen.point == OUTPUT_NORM and shape is not None and shape.code == "from-position-0":
        return Pattern("output-norm", f"{_where(seen)}: a layer after the last recorded one, or the last norm")
    return shape


# Codes of the shapes of an error that is at every position.
_EVERYWHERE = ("from-position-0", "every-position", "one-position")


def _in_layers(seen: Evidence) -> bool:
    """Whether operations of layers may lie between what agrees and this point."""
    if seen.stretch is None:
        return len(seen.flow.names) == 1
    return any(parse(name).layer is not None for name in seen.stretch.nodes)


def _attends(seen: Evidence) -> bool:
    """Whether operations of attention, through which other positions act, lie between what agrees and this point."""
    if seen.stretch is None:
        return False
    every = [seen.flow.whole.computations[node] for node in seen.stretch.nodes]
    return any(map(seen.flow.attends, seen.stretch.nodes)) or any(how.op == "MUL_MAT" and len(how.reads) > 1 for how in every)


def _sides(seen: Evidence) -> tuple[list[str], list[str]] | None:
    """The nodes of the stretch: those that feed into a soft max, itself included, and those that bypass it. None without a soft max."""
    if seen.stretch is None:
        return None
    inside = set(seen.stretch.nodes)
    past, waiting = {seen.point}, [seen.point]
    while waiting:
        name = waiting.pop()
        if seen.flow.attends(name):
            continue
        for other in seen.flow.whole.computations[name].reads:
            if other in inside and other not in past:
                past.add(other)
                waiting.append(other)
    feeding = [name for name in seen.stretch.nodes if name not in past or seen.flow.attends(name)]
    if not feeding:
        return None
    return feeding, [name for name in seen.stretch.nodes if name in past and name not in feeding]


def _listed(seen: Evidence, nodes: list[str]) -> str:
    """The points among these nodes, if they are few enough to be named: "blk.3: kq or kq_soft_max"."""
    named = [name for name in reversed(nodes) if name == seen.point or not seen.flow.whole.part_of_next(name)]
    layers = {parse(name).layer for name in named}
    if not named or len(named) > _NAMED or len(layers) != 1:
        return ""
    return " or ".join(parse(name).kind for name in named)


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


def _positions(seen: Evidence) -> str:
    failing = seen.position[seen.failed].tolist()
    if len(failing) == len(seen.position) > 1:
        return "every position"
    listed = ", ".join(map(str, failing[:6])) + (", …" if len(failing) > 6 else "")
    return f"position{'s' if len(failing) > 1 else ''} {listed}"


def _before(seen: Evidence) -> int:
    """The last right position before the first wrong one."""
    return int(seen.position[int(seen.failed.argmax()) - 1])


def _embedding(seen: Evidence) -> Pattern:
    if seen.failed.all() and len(seen.failed) > 1:
        return Pattern("embedding", f"the embedding is wrong at every position: {suspects(seen.flow, (EMBD,)) or 'the table'}")
    token = f" of token {seen.token!r}" if seen.token is not None else ""
    return Pattern("embedding-row", f"{_where(seen)}: the embedding row{token}, or another token id{_of_position(seen)}")


def _of_position(seen: Evidence) -> str:
    """A remark on the table of positions, if the model adds a row of one to the embedding."""
    tables = (weight for how in seen.flow.whole.computations.values() for weight in how.weights if "position_embd" in weight)
    table = next(tables, "")
    return f", or row {int(seen.position[seen.failed][0])} of {table}" if table else ""


def _decode_only(seen: Evidence) -> Pattern | None:
    prefill, decode = ~seen.decode, seen.decode
    if not prefill.any() or not decode.any() or seen.failed[prefill].any():
        return None
    first = int(seen.position[seen.failed][0])
    return Pattern(
        "decode", f"prefill is right, decode is wrong from position {first} on: the KV cache, or the position given to RoPE"
    )


def _all_but_last(seen: Evidence) -> Pattern | None:
    """A mask that lets positions see later ones: in each pass of several positions all but the last are wrong."""
    if seen.settled or parse(seen.point).layer is None or seen.flow.sees_later(seen.point):
        return None
    passes = [seen.step == step for step in distinct(seen.step[~seen.decode])]
    long = [chosen for chosen in passes if chosen.sum() > 2]
    if not long or not all(seen.failed[chosen][:-1].all() and not seen.failed[chosen][-1] for chosen in long):
        return None
    return Pattern("causal-mask", "wrong at every position but the last of the pass: the causal mask is missing or shifted")


def _shape(seen: Evidence) -> Pattern | None:
    failing = seen.position[seen.failed]
    where = _where(seen)
    if len(seen.position) == 1:
        return Pattern("one-position", f"{where}: record more positions to see a pattern")
    first = int(failing[0])
    tail = bool(seen.failed[int(seen.failed.argmax()) :].all())
    if tail and seen.failed.all():
        code = "from-position-0" if first == 0 else "every-position"
        return Pattern(code, f"{where}: {_at_every_position(seen, first)}")
    if tail and _before(seen) == 0 and (len(failing) > 1 or first == 1):
        return Pattern("from-position-1", f"{where}: {_beyond_one_key(seen)}")
    if tail and len(failing) > 1:
        return _tail(seen, first, where)
    if not seen.failed[1:].any():
        return Pattern(
            "first-position",
            f"only position {first} is wrong: BOS, or the position number of the first token{_or_experts(seen)}",
        )
    if between := _between_positions(seen):
        return Pattern("single-positions", f"{where}: {between}")
    if seen.settled and seen.stretch is not None and seen.stretch.inputs:
        return Pattern("single-positions", f"{where}: what it is made from is right there{_or_experts(seen)}")
    if seen.embedded:
        sentence = "embd is right there: attention (Q, K, RoPE, mask) or another operation at these positions"
        return Pattern(
            "single-positions", f"{where}; {sentence}, or an error that is below the limit elsewhere{_or_experts(seen)}"
        )
    token = f" ({seen.token!r})" if seen.token is not None else ""
    return Pattern(
        "single-positions", f"{where}: the embedding row of that token{token}, or another token id{_of_position(seen)}"
    )


def _tail(seen: Evidence, first: int, where: str) -> Pattern:
    """The pattern of a point that is wrong from a position above 1 on."""
    at = int(seen.failed.argmax())
    if seen.gradual:
        return Pattern(
            "grown",
            f"{where}, by an error that grows with the position and is just below the limit before {first}: no edge there",
        )
    if seen.step[at] != seen.step[at - 1]:
        return Pattern("chunk", f"{where}: a new pass begins there: the cache's rows of the previous chunk, or the positions")
    if first >= 16 and first % 16 == 0 and first - _before(seen) == 1:
        size = first & -first
        return Pattern("chunk", f"{where}: {first} is a multiple of {size}: the edge of a chunk, a tile or a window")
    limit = f"a limit at {first} (a window, the cache's size, how far RoPE was scaled), or one row at {first} that later positions see"
    return Pattern("from-position-n", f"{where}: {limit}{_or_experts(seen)}")


def _at_every_position(seen: Evidence, first: int) -> str:
    """What can be wrong at position 0 as well, where attention has one key, so that its softmax is 1 whatever the score is (without
    sinks)."""
    sides = None if seen.flow.sees_later(seen.point) else _sides(seen)
    nodes = list(seen.stretch.nodes) if seen.stretch is not None else []
    sinks = any(seen.flow.attends(name) and seen.flow.whole.computations[name].weights for name in nodes)
    named = _listed(seen, sides[1] if sides is not None and first == 0 and not sinks else nodes)
    if named:
        return named
    if sinks:
        return "attention (its sinks matter at position 0, too), the output projection, FFN, a norm or weight"
    if sides is None and any(map(recurrent, seen.flow.operations(nodes))):
        return "a projection, the recurrence (its state, its convolution or its decay), a norm or weight"
    if seen.flow.sees_later(seen.point):
        return f"{_UNMASKED}, the output projection, FFN, a norm or weight"
    if nodes and not _attends(seen):
        experts = "the choice of experts, their weights or products, " if CHOICES & seen.flow.operations(nodes) else ""
        return f"{experts}a product, an activation, a norm or weight: no attention lies between"
    return "V, the output projection, FFN, a norm or weight, or no causal mask"


def _between_positions(seen: Evidence) -> str:
    """A remark if no operation between what agrees and this point joins positions, so that it cannot be attention; else ""."""
    if seen.stretch is None or seen.settled or not seen.stretch.inputs or _attends(seen):
        return ""
    if any(recurrent(op) for op in seen.flow.operations(seen.stretch.nodes)):
        return ""
    unseen = " and ".join(seen.stretch.inputs[:2])
    return f"the unrecorded part of {unseen}, or an operation at these positions alone: none here combines positions"


def _beyond_one_key(seen: Evidence) -> str:
    """What can be right at position 0 but wrong at all others."""
    if seen.stretch is not None and any(recurrent(op) for op in seen.flow.operations(seen.stretch.nodes)):
        return "the recurrence from position to position: its state, its convolution or its decay"
    if between := _between_positions(seen):
        return between
    if seen.flow.sees_later(seen.point):
        return f"{_UNMASKED}, or an operation on these positions alone{_or_experts(seen)}"
    sides = _sides(seen)
    named = _listed(seen, sides[0]) if sides is not None else ""
    return f"{named} (scale, mask)" if named else f"Q, K, RoPE, the attention's scale or its mask{_or_experts(seen)}"


def _or_experts(seen: Evidence) -> str:
    """A remark that experts may be chosen wrongly, if there are any: a router errs token by token, so that positions say nothing."""
    nodes = seen.stretch.nodes if seen.stretch is not None else ()
    return ", or which experts are chosen: that differs by token" if CHOICES & seen.flow.operations(nodes) else ""
