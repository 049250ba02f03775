"""Signs of another arithmetic than the one that operations were judged in, reported before any of them is blamed."""

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, WRONG, Operation
from checkpoints.record import Header
from engine.graph import Step
from engine.replay.kept import reads_cache

from ..diff.limits import EXACT_FLOOR, family, limits
from .arithmetic import Judgement, without_blame
from .judged_layers import LAYER
from .operation import Isolator

# Errors of 8-bit products have similar sizes. In right engines with 8-bit activations the largest NMSE of a product was at most 44 times
# the smallest: small models of 24 architectures (44 in rwkv6, elsewhere at most 16), 12 in the embedded model. Twice that, rounded up.
_ALIKE = 100.0
# NMSE with a cache of 4-bit numbers in blocks of 32, four small models: operations that read it 1.4e-2 at most, layers 2.8e-2; twice that.
_FEW_BITS = 0.06
_OPEN_CACHE = (
    "off by noise of the size that a cache of 8 bits makes, which nothing states "
    '("kv_type" in the header does): how this engine rounds to it is not known'
)
_REASON = "its error is noise of the size that 8-bit activations make, as in every product here: not declared? --compute q8 allows for it"


def as_eight_bits(operations: Sequence[Operation], scaled: Collection[str] = ()) -> list[Operation]:
    """The operations, whole layers among them. None is blamed if all wrong ones are products with weights, off by what 8-bit activations
    cost, no product is right to float32's last digits, and none is the right value times a factor (`scaled`).
    """
    wrong = [operation for operation in operations if operation.status == WRONG]
    products = [
        operation for operation in operations if operation.sampled is not None or (operation in wrong and operation.weight)
    ]
    errors = [operation.nmse for operation in products if operation.nmse is not None]
    most = limits(None, None, compute="q8").operations
    alike = bool(errors) and min(errors) > EXACT_FLOOR.operations and max(errors) <= min(most, _ALIKE * min(errors))
    others = [operation for operation in wrong if operation not in products]
    if (
        not alike
        or any(operation.name in scaled for operation in wrong)
        or any(operation.operation != LAYER or operation.nmse is None or operation.nmse > most for operation in others)
    ):
        return list(operations)
    return [
        replace(operation, status=NOT_OBSERVABLE, reason=_REASON) if operation in wrong else operation
        for operation in operations
    ]


def of_cache(kv_type: str) -> float:
    """What a cache of this type costs, NMSE; "" is F32."""
    if kv_type and family(kv_type) == "quantised" and "8" not in kv_type:
        return _FEW_BITS
    return limits(None, Header(source="", mode="exact", compute="f32", kv_type=kv_type), compute="f32").operations


def proven_within(layers: Sequence[Operation], limit: float, kv_type: str) -> list[Operation]:
    """The layers beside llama.cpp's own, whose cache is F32; one over the limit is not proven by what the stated cache would cost."""
    reason = f"off by no more than a cache of {kv_type} costs beside one of F32: a fault as small in what was not recorded would pass"
    return [
        replace(layer, status=NOT_OBSERVABLE, reason=reason)
        if layer.status == PROVEN and layer.nmse is not None and layer.nmse > limit
        else layer
        for layer in layers
    ]


def of_stated_cache(operations: Sequence[Operation], isolators: Sequence[Isolator], kv_type: str) -> list[Operation]:
    """The operations. If a cache is stated to be quantised, those that read it are not blamed for noise of the size that this costs, unless
    some follow exactly: in which blocks an engine rounds, and by which scales, is its own affair.
    """
    if not kv_type or family(kv_type) != "quantised":
        return list(operations)
    reading = _readers_of_a_cache(isolators)
    if any(operation.status == PROVEN for operation in operations if operation.name in reading):
        return list(operations)
    most = of_cache(kv_type)
    records = {name: record for isolator in isolators for name, record in isolator.records.items()}
    reason = f"off by noise of the size that a cache of {kv_type} makes: how this engine rounds to that type is not known"
    return [
        replace(operation, status=NOT_OBSERVABLE, reason=reason)
        if operation.status == WRONG
        and operation.name in reading
        and records[operation.name].nmse <= most
        and not records[operation.name].scaled
        else operation
        for operation in operations
    ]


def of_open_cache(judgement: Judgement) -> Judgement:
    """The judgement of an engine that states no type of its cache: what reads the cache is not blamed if it is off by noise of the size
    that a cache of 8 bits makes (FP8, by whichever scales), at every position and without a factor, unless some of it follows exactly.
    """
    reading = _readers_of_a_cache(judgement.bench.isolators)
    judged = [operation for operation in judgement.operations if operation.name in reading and operation.nmse is not None]
    most, records = of_cache("q8_0"), judgement.bench.records
    noisy = {
        operation.name
        for operation in judged
        if operation.status == WRONG and records[operation.name].noisy and records[operation.name].nmse <= most
    }
    if not noisy or any(operation.status == PROVEN for operation in judged):
        return judgement
    return without_blame(replace(judgement, cache="q8_0"), dict.fromkeys(noisy, _OPEN_CACHE))


def _readers_of_a_cache(isolators: Sequence[Isolator]) -> set[str]:
    """The points that are judged by what a cache keeps, directly or by way of what was not recorded."""
    return {
        step.makes
        for isolator in isolators
        for program in isolator.definitions[0].programs
        for step in program.judged
        if any(reads_cache(read) for way in program.way(step.makes) for read in way.reads)
    }


def in_order(operations: Sequence[Operation], steps: Sequence[Step]) -> list[Operation]:
    """The operations in the order of the model."""
    place = {step.makes: number for number, step in enumerate(steps)}
    return sorted(operations, key=lambda operation: place.get(operation.name, len(place)))
