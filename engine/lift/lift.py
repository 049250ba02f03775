"""The lift: a recorded graph as a list of steps.

A node that begins one of `engine.ops`' operations (`patterns`) becomes one step together with its neighbours; a view becomes
the way an operand is read; every other node becomes a step of its ggml operation. What a leaf of the cache or of a state holds is known
from the node that writes into it.
"""

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.errors import ModelError
from checkpoints.graph import NODE, VIEWS, RecordedGraph, Size, Tensor
from checkpoints.points import ENCODER, order

from .. import ops
from ..graph import ENCODED, PASSES, POSITIONS, TOKENS, State, Step, View, name_of, read_as
from .generic import generic
from .kept import selects
from .lifter import Lifter
from .operands import ONE, ZERO, Unliftable, numpy_shape
from .patterns import PATTERNS
from .written import leave_states, writes


class Lifted(Struct, frozen=True):
    """The steps of a model: of a pass over several tokens, and of a pass over a single token where those differ.

    `encoder`, in an encoder–decoder, are the steps of the encoder's pass, whose last value the other passes read as `ENCODED`.
    """

    several: tuple[Step, ...]
    single: tuple[Step, ...] | None = None
    encoder: tuple[Step, ...] | None = None


def lift(recording: RecordedGraph) -> Lifted:
    """The steps of a recorded graph.

    Raises:
        ModelError: an operation that the engine lacks, an input that follows no rule, or a node that cannot be read as steps; the
            message names it and its layer.
    """
    several = _steps(Lifter(recording, recording.several))
    single = None if recording.single is None else tuple(_steps(Lifter(recording, recording.single, single=True)))
    if recording.encoder is None:
        return Lifted(tuple(several), single)
    encoder = _steps(Lifter(recording, recording.encoder))
    return Lifted(tuple(several), single, tuple(_of_the_encoder(step) for step in encoder))


def _of_the_encoder(step: Step) -> Step:
    """The same step with its inputs and inner values renamed, since the decoder uses the same names."""

    def named(name: str) -> str:
        return name if name.startswith(ENCODER) else ENCODER + name

    reads = tuple(read_as(read, named(name_of(read))) for read in step.reads)
    return replace(step, makes=named(step.makes), reads=reads)


def _steps(lifter: Lifter) -> list[Step]:
    """All steps, in the order of the vocabulary where the graph allows it."""
    for index, tensor in enumerate(lifter.tensors):
        if tensor.kind == NODE and tensor.op in VIEWS and tensor.point:
            lifter.memory.own.add(index)
    for index, tensor in enumerate(lifter.tensors):
        if tensor.kind != NODE or index in lifter.done:
            continue
        try:
            _lift_node(lifter, index, tensor)
        except Unliftable as error:
            raise lifter.refused(index, str(error)) from error
        for name, start, stop in tensor.parts if index in lifter.names else ():
            _part(lifter, index, name, start, stop)
    leave_states(lifter)
    return _ordered(_without_unread(lifter.added_steps))


def _lift_node(lifter: Lifter, index: int, tensor: Tensor) -> None:
    if tensor.op in VIEWS:
        if index in lifter.memory.own:
            _own_view(lifter, index, tensor)
        return
    if any(size == ZERO for size in tensor.ne):  # it belongs to sequences that do not exist
        return
    if writes(lifter, index, tensor) or selects(lifter, index, tensor):
        return
    for pattern in PATTERNS.get(tensor.op, ()):
        if pattern(lifter, index, tensor):
            return
    generic(lifter, index, tensor)


def _own_view(lifter: Lifter, index: int, tensor: Tensor) -> None:
    """Make the step of a view that is a point: it copies the elements that the view shows."""
    lifter.memory.own.discard(index)
    try:
        base = lifter.memory.place(index).base
        if base not in lifter.names:
            return
        whole, axis = lifter.memory.layout(index)
        if axis == 0:
            try:
                lifter.make(index, Step(tensor.point, ops.part, (lifter.rows(index),)))
            except Unliftable:  # heads with gaps between them
                shape, strides = numpy_shape(tensor.ne), lifter.memory.strides(index)
                first = shape.index(whole[0])
                view = lifter.memory.view(
                    index, lifter.names[base], lifter.memory.layout(base)[0], shape[first:], strides[first:]
                )
                lifter.make(index, Step(tensor.point, ops.positions_first, (view,)))
        else:
            read, _, _ = lifter.read(index)
            view = read if isinstance(read, View) else lifter.memory.view(index, name_of(read), lifter.memory.layout(base)[0])
            lifter.make_rows(index, Step(tensor.point, ops.part, (view,), axis=axis))
    finally:
        if index in lifter.names:
            lifter.memory.own.add(index)


def _part(lifter: Lifter, index: int, name: str, start: int, stop: int) -> None:
    """Make the step of a point that is a part of each row of a value."""
    whole, axis = lifter.memory.layout(index)
    if axis != 0 or len(whole) != 2:
        raise Unliftable(f"{name} is a part of something that is not a row")
    view = View(lifter.names[index], whole, (lifter.t, Size(stop - start)), (whole[1], ONE), Size(start))
    lifter.add_value(Step(name, ops.part, (view,)))


def _without_unread(steps: list[Step]) -> list[Step]:
    """The steps without the inner ones that nothing reads."""
    kept: list[Step] = []
    wanted = {read.of for step in steps for read in step.reads if isinstance(read, State)}
    for step in reversed(steps):
        if step.inner and step.makes not in wanted:
            continue
        kept.append(step)
        wanted.update(step.names)
    return kept[::-1]


def _ordered(steps: list[Step]) -> list[Step]:
    """The steps in the vocabulary's order where each still comes after what it reads, else in the graph's.

    Raises:
        ModelError: a point is made from itself, because the model computes its layers several times in a pass.
    """
    by_name = {step.makes: step for step in steps}
    place = {name: number for number, name in enumerate(order([step.makes for step in steps if not step.inner]))}
    result: list[Step] = []
    known = {TOKENS, POSITIONS, PASSES, ENCODED}

    def put(step: Step) -> None:
        waiting, begun = [step], set[str]()
        while waiting:
            missing = [name for name in waiting[-1].names if name not in known]
            begun.add(waiting[-1].makes)
            if begun.intersection(missing):
                raise ModelError(
                    f"this model computes its layers more than once in a pass: {missing[0]} is made from itself.",
                    "Our engine computes each layer once; `parity dump ref` records every time.",
                    code="graph",
                )
            waiting += [by_name[name] for name in missing[:1]]
            if not missing:
                ready = waiting.pop()
                if ready.makes not in known:
                    known.add(ready.makes)
                    result.append(ready)

    for step in sorted((step for step in steps if not step.inner), key=lambda step: place[step.makes]):
        put(step)
    for step in steps:
        put(step)
    return result
