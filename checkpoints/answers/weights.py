"""The result of checking a model's weights: one entry for each tensor."""

from math import prod

from msgspec import Struct

EQUAL = "equal"
DIFFERENT = "different"
NOT_CHECKED = "not checked"


class FirstDifference(Struct, frozen=True):
    """Where the results differ: element (row-major), its block's number and bytes (hex), and the values by their origin."""

    element: int
    block: int
    bytes: str
    values: dict[str, float]


class TensorCheck(Struct, frozen=True):
    """One tensor. `status` is "equal", "different", "not checked", or a phrase on what it equals ("equal when transposed").

    `reason` explains; `by` names what was compared; `elements` is the number of values, `nonfinite` of NaN and infinities.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    status: str
    elements: int = 0
    by: tuple[str, ...] = ()
    reason: str = ""
    first: FirstDifference | None = None
    nonfinite: int = 0

    @property
    def right(self) -> bool:
        """Whether no check found anything wrong with it."""
        return (self.status.startswith(EQUAL) and not self.reason) or self.status == NOT_CHECKED


class WeightsCheck(Struct, frozen=True):
    """The whole answer; `theirs` names the file of a foreign engine's weights, or is empty. `tolerance` is the difference
    that still counts as equal.
    """

    model: str
    theirs: str
    tensors: tuple[TensorCheck, ...]
    bytes: int
    notes: tuple[str, ...] = ()
    tolerance: str = "0"

    @property
    def values(self) -> int:
        """The number of values that the checked tensors have in the file."""
        return sum(prod(tensor.shape) for tensor in self.tensors if tensor.status != NOT_CHECKED)

    @property
    def seen(self) -> int:
        """How many of these were compared."""
        return sum(tensor.elements for tensor in self.tensors if tensor.status != NOT_CHECKED) if self.theirs else self.values

    def __bool__(self) -> bool:
        return all(tensor.right for tensor in self.tensors)
