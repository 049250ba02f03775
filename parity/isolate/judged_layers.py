"""llama.cpp as the judge of a foreign engine's layers: it is fed that engine's own hidden state, window by window."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Graft, Operation
from checkpoints.errors import InputError, ReferenceFailed
from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM, in_layer, parse, resolve
from checkpoints.summary import summarise
from engine.engine import Engine
from engine.graph import compute
from engine.replay.proof import proof_steps
from reference.client import Reference
from reference.jobs import NATIVE, Node

from ..diff.limits import limits
from ..diff.measured.align import Pair
from ..diff.measured.measure import measure
from ..diff.readings.routing import names_experts
from .arithmetic import SPREAD
from .unrecorded import attends
from .values import WholeValues

LAYER = "layer"
# What is undecided in an operation, because nothing states an arithmetic, may have the size of the coarsest: a right falcon-h1 with 8-bit
# activations was 3.9e-4 beside llama.cpp's own layer, which rounds them in other blocks (benchmarks/right_engines.py --from 220056).
_EIGHT_BITS = limits(None, None, compute="q8").operations


def hidden_state(values: WholeValues, name: str) -> NDArray[np.float32] | None:
    """A point's whole rows at positions 0 … T − 1 over all passes, [T, D]; None if some are missing."""
    parts = [value for step in values.passes if (value := values.get(name, step)) is not None]
    if not parts:
        return None
    positions = np.concatenate([part.positions for part in parts])
    rows = np.concatenate([part.data.reshape(len(part.positions), -1) for part in parts])
    order = np.unique(positions, return_index=True)[1]
    return rows[order] if np.array_equal(positions[order], np.arange(len(order))) else None


def judged_layers(
    reference: Reference,
    model: Path,
    values: WholeValues,
    operations: Sequence[Operation],
    mode: str,
    limit: float,
    suspects: Collection[str] = (),
    rounding: Collection[str] = (),
) -> tuple[list[Operation], frozenset[str]]:
    """Each layer whose operations are not all observable, judged as a whole: its own input, llama.cpp's layer, its output.

    The output may be a slice. Layers whose whole input was not recorded are not observable, nor are those whose
    input or output was recorded wrong (`suspects`). Where an operation was proven to round its activations as ggml does (`rounding`), which
    the mode does not, the layer may be llama.cpp's own that rounds them, too.

    Returns:
        The layers, and outputs that turn out to be recorded wrong: the next layer read the value that llama.cpp's own layer makes.
    """
    hidden = sorted(
        {operation.layer for operation in operations if operation.status == NOT_OBSERVABLE and operation.layer is not None}
    )
    judged: list[Operation] = []
    right: dict[int, NDArray[np.float32]] = {}  # what the wrong layers should have made
    denied: set[int] = set()
    for layer in hidden:
        output = in_layer(layer, "l_out")
        before = in_layer(layer - 1, "l_out") if layer else EMBD
        if output not in values.dump.points and hidden_state(values, output) is None:
            judged.append(Operation(LAYER, layer, NOT_OBSERVABLE, reason=f"no record of {output}"))
            continue
        if suspect := [name for name in (before, output) if name in suspects]:
            judged.append(Operation(LAYER, layer, NOT_OBSERVABLE, reason=f"the record of {suspect[0]} is suspect"))
            continue
        state = hidden_state(values, before)
        if state is None:
            judged.append(Operation(LAYER, layer, NOT_OBSERVABLE, reason=f"no whole value of {before} at every position"))
            continue
        try:
            computed = _layer_output(reference, model, layer, state, mode)
            verdict = _compared(values, output, computed, layer, limit)
            rounds = any(operation.layer == layer and operation.name in rounding for operation in operations)
            if verdict.status == WRONG and rounds:
                as_stored = _compared(values, output, _layer_output(reference, model, layer, state, NATIVE), layer, limit)
                verdict = as_stored if as_stored.status == PROVEN else verdict
        except (InputError, ReferenceFailed) as error:  # an architecture whose layers cannot be run alone
            judged.append(Operation(LAYER, layer, NOT_OBSERVABLE, reason=error.message.rstrip(".")))
            continue
        if verdict.status == WRONG and layer - 1 in right:
            again = _compared(values, output, _layer_output(reference, model, layer, right[layer - 1], mode), layer, limit)
            if again.status == PROVEN:
                verdict = again
                denied.add(layer - 1)
        if verdict.status == WRONG:
            right[layer] = computed.reshape(len(computed), -1)
        judged.append(verdict)
    return judged, frozenset(in_layer(layer, "l_out") for layer in denied)


def _layer_output(reference: Reference, model: Path, layer: int, state: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
    """The output of llama.cpp's own layer for a hidden state [T, D]."""
    output = in_layer(layer, "l_out")
    return dict(_by_point(reference.layers(model, layer, layer + 1, state, output, mode)))[output]


def eliminated(operations: Sequence[Operation], layers: Sequence[Operation], suspects: Collection[str] = ()) -> list[Operation]:
    """The layers; for a wrong layer whose recorded operations are all right, with what must be wrong then.

    Layers whose output was recorded wrong (`suspects`) say that instead, and one that may be wrong by nothing but the rounding of its
    operations is not observable: in lower arithmetic a near tie of experts falls the other way, and a sum of roundings is larger than each.
    """
    explained = []
    for layer in layers:
        output = "" if layer.layer is None else in_layer(layer.layer, "l_out")
        if output not in suspects and (reason := _by_rounding(operations, layer)):
            explained.append(replace(layer, status=NOT_OBSERVABLE, reason=reason))
            continue
        reason = f"{layer.reason}{_rest(operations, layer)}"
        if output in suspects:
            reason = f"the record of {output} is suspect, not the layer: the next layer agrees with llama.cpp's value, not the recorded one"
        explained.append(replace(layer, reason=reason))
    return explained


def _by_rounding(operations: Sequence[Operation], layer: Operation) -> str:
    """A sentence on a wrong layer of which only the rounding of some operations is in question, if the others are proven: it chooses
    experts, or is no further off than such rounding makes it. Otherwise "".
    """
    inside = [operation for operation in operations if operation.layer == layer.layer]
    rest = [operation for operation in inside if operation.status == NOT_OBSERVABLE]
    sizes = [operation.nmse for operation in rest if operation.nmse is not None]
    blamed = any(operation.status == WRONG for operation in inside)
    if layer.status != WRONG or layer.nmse is None or blamed or not rest or len(sizes) < len(rest):
        return ""
    right = f"its operations are right but for the rounding of {', '.join(operation.operation for operation in rest)}"
    if any(names_experts(operation.name) for operation in inside):
        return f"{right}, which may choose other experts"
    as_large = layer.nmse <= min(_EIGHT_BITS, SPREAD * max(sizes))  # what was not seen of an operation may be further off
    return f"{right}, and 8-bit activations make an error as large" if as_large else ""


def _rest(operations: Sequence[Operation], layer: Operation) -> str:
    """What must be wrong in a wrong layer if all its judged operations are right; else ""."""
    inside = [operation for operation in operations if operation.layer == layer.layer]
    rest = [operation.operation for operation in inside if operation.status == NOT_OBSERVABLE]
    proven = [operation for operation in inside if operation.status == PROVEN]
    if layer.status != WRONG or not rest or not proven or len(rest) + len(proven) < len(inside):
        return ""
    named = "attention" if all(map(attends, rest)) else f"one of {', '.join(rest)}"
    return f"; every operation of it that could be judged is right: so it is {named}"


def _by_point(items: Iterable[tuple[Node, NDArray[np.float32]]]) -> Iterable[tuple[str, NDArray[np.float32]]]:
    return ((node.point, value) for node, value in items)


def _compared(values: WholeValues, output: str, computed: NDArray[np.float32], layer: int, limit: float) -> Operation:
    rows = values.dump.points.get(output)
    if (whole := hidden_state(values, output)) is not None:
        rows = summarise(output, whole, np.arange(len(whole)), slice_size=None)
    if rows is None:
        return Operation(LAYER, layer, NOT_OBSERVABLE, reason=f"no record of {output}")
    rows = rows.take(np.flatnonzero(rows.token_idx < len(computed)))
    ref = summarise(
        output, computed.reshape(len(computed), -1)[rows.token_idx], rows.token_idx, slice_size=rows.values.shape[1]
    )
    errors = measure([Pair(output, rows, ref)]).nmse
    if not len(errors) or np.isnan(errors).all():
        return Operation(LAYER, layer, NOT_OBSERVABLE, reason=f"{output} has no values to compare")
    worst = int(np.nanargmax(errors))
    nmse = float(errors[worst])
    reason = "" if nmse <= limit else "llama.cpp's own layer, fed with this engine's input, gives another output"
    return Operation(
        LAYER, layer, PROVEN if nmse <= limit else WRONG, nmse, int(rows.token_idx[worst]), len(values.passes), reason=reason
    )


def graft(
    reference: Reference, engine: Engine, values: WholeValues, tokens: NDArray[np.int64], point: str, mode: str
) -> list[Graft]:
    """How llama.cpp continues from a foreign hidden state, position by position, compared with its own run over the same tokens.

    Raises:
        InputError: the point is not a layer's output, or was not recorded whole.
    """
    if engine.encoder is not None:
        raise InputError(
            f"--graft: llama.cpp cannot go on from a layer of an encoder–decoder ({engine.hp.architecture}), which reads its encoder too.",
            "Leave --graft out.",
            code="graft",
        )
    name, n_layers = resolve(point), engine.hp.n_layers
    parsed = parse(name)
    layer = -1 if name == EMBD else parsed.layer
    if layer is None or (name != EMBD and parsed.kind != "l_out") or layer >= n_layers:
        raise InputError(
            f"--graft {point!r} is not a layer's output.", f"Use embd or blk.0.l_out … blk.{n_layers - 1}.l_out.", code="graft"
        )
    state = hidden_state(values, name)
    if state is None:
        raise InputError(
            f"the dump has no whole {name} at every position.", "Record it at all positions: --points all --full.", code="graft"
        )
    path = engine.model.path
    ids = [int(token) for token in tokens[: len(state)]]
    own = dict(_by_point(reference.capture(path, ids, LOGITS, mode)))[LOGITS]
    if layer == n_layers - 1:  # only llama.cpp's norm and output matrix are left to continue with
        head = proof_steps(engine.steps, native=mode == "native")[-2:]
        normed = compute(head[0], [state], engine.weights)
        grafted = compute(head[1], [normed], engine.weights)
    else:
        going_on = reference.layers(path, layer + 1, n_layers, state, f"{OUTPUT_NORM},{LOGITS}", mode)
        grafted = dict(_by_point(going_on))[LOGITS]
    pieces = reference.pieces(path, ids)
    return [_graft(position, pieces, own[position], grafted[position]) for position in range(len(state))]


def _graft(position: int, pieces: Sequence[str], own: NDArray[np.float32], grafted: NDArray[np.float32]) -> Graft:
    p, q = _log_soft_max(own), _log_soft_max(grafted)
    best = np.sort(own)[-2:].astype(np.float64)
    return Graft(
        position=position,
        token=pieces[position] if position < len(pieces) else "",
        kl=float(max(np.sum(np.exp(p) * (p - q)), 0.0)),
        own_choice=int(own.argmax()),
        grafted_choice=int(grafted.argmax()),
        margin=float(best[1] - best[0]) if len(best) > 1 else 0.0,
    )


def _log_soft_max(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    shifted: NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return shifted
