"""Points that a dump lacks are passed over: operations that read them are judged from the nearest recorded values before them.

Attention can be judged without scores: queries, keys and values at all positions determine its result.
"""

from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from checkpoints.answers.isolate import NOT_OBSERVABLE, Operation
from checkpoints.points import parse
from engine import ops
from engine.graph import Step

from .bench import IsolationBench
from .judging import Definition
from .values import WholeValues

_NO_OUTPUT = "its output was not recorded as a whole"
ATTENTION = ("k_read", "v_read")


def attends(kind: str) -> bool:
    """Whether a kind of point lies inside attention: scores, their soft max, what the cache gave, the mix of values."""
    return kind.startswith("kq") or kind in ATTENTION


def passed_over(steps: Sequence[Step], recorded: Collection[str], *, rounds: bool) -> frozenset[str]:
    """The points that a dump lacks and that are computed instead, because only plain arithmetic makes them.

    Args:
        recorded: the points that were recorded whole, in some pass.
        rounds: whether products round their activations: a computed value would be rounded differently here and there, so that only
            values read by operations without weights are passed over.
    """
    names = {step.makes for step in steps if not step.inner and step.makes not in recorded and _plain(step)}
    if not rounds:
        return frozenset(names)
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.names:
            readers.setdefault(name, []).append(step)
    known = {step.makes: step for step in steps}
    while kept := {name for name in names if any(not _plain(known[to]) for to in _judged(name, readers, names) if to in known)}:
        names -= kept
    return frozenset(names)


def _judged(name: str, readers: Mapping[str, Sequence[Step]], names: set[str]) -> set[str]:
    """The steps that are judged through a value: its readers, directly or through values between points and points passed over."""
    reached, waiting = set[str](), [name]
    while waiting:
        for step in readers.get(waiting.pop(), ()):
            if step.makes not in reached:
                reached.add(step.makes)
                if step.inner or step.makes in names:
                    waiting.append(step.makes)
    return reached


def _plain(step: Step) -> bool:
    """Whether a step has no weights except attention's sinks, and follows from earlier values at all."""
    return bool(step.names) and (not any(step.weights) or step.op is ops.causal_soft_max)


def without(definition: Definition, names: Collection[str]) -> Definition:
    """The definition in which these points are computed like any value between points."""

    def hidden(steps: Sequence[Step]) -> list[Step]:
        return [replace(step, inner=True) if step.makes in names else step for step in steps]

    single = None if definition.single is None else hidden(definition.single)
    return replace(definition, several=hidden(definition.several), single=single, passed_over=names)


def stretches(steps: Sequence[Step], names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The judged points that are made through points that are passed over, each with those, in the order of the model."""
    through: dict[str, dict[str, None]] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for step in steps:
        passed_over: dict[str, None] = {}
        for name in step.names:
            passed_over |= through.get(name, {})
        if step.makes in names:
            passed_over[step.makes] = None
        if step.inner or step.makes in names:
            through[step.makes] = passed_over
        elif passed_over:
            sources[step.makes] = tuple(passed_over)
    return sources


def pass_over(bench: IsolationBench, values: WholeValues, mode: str, kv_type: str) -> list[Operation]:
    """Let points that the dump lacks be computed where that is sound; returns the verdicts on their operations."""
    recorded = {name for step in values.passes for name in values.points(step)}
    passed = []
    for isolator in bench.isolators:
        steps = isolator.definitions[0].several
        names = passed_over(steps, recorded, rounds=mode == "native")
        if kv_type != "f32":  # it rounds attention's weights as well: a computed value is rounded differently here and there
            names = frozenset(name for name in names if parse(name).kind in ATTENTION)
        isolator.definitions = [without(definition, names) for definition in isolator.definitions]
        isolator.stretches = stretches(steps, names)
        judged = {name: to for to, through in isolator.stretches.items() if to in recorded for name in through}
        for name in names:
            together = f"not recorded as a whole; judged together with {judged[name]}" if name in judged else _NO_OUTPUT
            point = parse(name)
            passed.append(Operation(point.kind, point.layer, NOT_OBSERVABLE, reason=together))
    return passed
