"""What checking a model's weights found: one entry a tensor."""

from dataclasses import dataclass

EQUAL = "equal"
DIFFERENT = "different"
NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class FirstDifference:
    """Where the results part: element (row-major), its block's number and bytes (hex), and the values by who made them."""

    element: int
    block: int
    bytes: str
    values: dict[str, float]


@dataclass(frozen=True)
class TensorCheck:
    """One tensor. `status` is "equal", "different", "not checked", or in words what it is equal to ("equal when transposed").

    `reason` explains; `by` names what was compared; `elements` how many values, `nonfinite` how many of them are NaN or infinite.
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
        """Whether nothing is wrong with it, as far as was looked."""
        return (self.status.startswith(EQUAL) and not self.reason) or self.status == NOT_CHECKED


@dataclass(frozen=True)
class WeightsCheck:
    """The whole answer; `theirs` names the file of a foreign engine's weights, or is empty. `tolerance` says
    what still counts as equal.
    """

    model: str
    theirs: str
    tensors: tuple[TensorCheck, ...]
    bytes: int
    notes: tuple[str, ...] = ()
    tolerance: str = "0"

    def __bool__(self) -> bool:
        return all(tensor.right for tensor in self.tensors)
