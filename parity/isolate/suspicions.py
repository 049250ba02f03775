"""Signs of another arithmetic than the one that operations were judged in, reported before any of them is blamed."""

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from checkpoints.answers.isolate import NOT_OBSERVABLE, WRONG, Operation
from engine.graph import Step

from ..diff.limits import EXACT_FLOOR, limits
from .judged_layers import LAYER

# Errors of 8-bit products have similar sizes. In right engines with 8-bit activations the largest NMSE of a product was at most 44 times
# the smallest: small models of 24 architectures (44 in rwkv6, elsewhere at most 16), 12 in the embedded model. Twice that, rounded up.
_ALIKE = 100.0
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


def in_order(operations: Sequence[Operation], steps: Sequence[Step]) -> list[Operation]:
    """The operations in the order of the model."""
    place = {step.makes: number for number, step in enumerate(steps)}
    return sorted(operations, key=lambda operation: place.get(operation.name, len(place)))
