"""The result of isolating: one entry for each operation of each layer, judged only by its own inputs and output."""

from typing import Any

from msgspec import Struct, field

PROVEN = "proven"
WRONG = "wrong"
NOT_OBSERVABLE = "not observable"


class Operation(Struct, frozen=True):
    """One operation of one layer (`layer` None: once in the model).

    Attributes:
        operation: the kind of the point that it computes ("q_rope", "ffn_out", "logits"; "layer" for a whole layer).
        nmse: of the worst position, over all passes; None if nothing could be compared.
        position: the worst position; `passes`: how many forward passes were compared.
        sampled: for products, the largest error of single elements recomputed as float64 dot products, relative to
            ‖x‖·‖w‖; None for other operations.
        weight: type of the weight, if there is one.
        reason: why it is not observable, or what the error looks like.
    """

    operation: str
    layer: int | None
    status: str
    nmse: float | None = None
    position: int | None = None
    passes: int = 0
    sampled: float | None = None
    weight: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """The point that the operation computes: "blk.7.ffn_out"."""
        return self.operation if self.layer is None else f"blk.{self.layer}.{self.operation}"


class Element(Struct, frozen=True):
    """One element of the logits recomputed as a float64 dot product: row `row` of the output matrix at a position."""

    row: int
    position: int
    theirs: float
    dot: float
    error: float  # relative to ‖x‖·‖w‖
    right: bool


class Graft(Struct, frozen=True):
    """What the reference predicts from a foreign hidden state at one position, compared with its own run."""

    position: int
    token: str
    kl: float
    own_choice: int
    grafted_choice: int
    margin: float  # between the reference's own first and second choice, in logits

    @property
    def changes(self) -> bool:
        """Whether the next token changes."""
        return self.own_choice != self.grafted_choice


class Isolation(Struct, frozen=True):
    """The whole answer.

    Attributes:
        judged: whose operations these are ("llama.cpp", or a dump's name).
        limit: the NMSE above which an operation is wrong; `floor`: what the embedded model reached here (None: not measured).
        findings: what the checks of attention found wrong, as sentences.
        not_checked: sentences on what was not checked.
        facts: other facts worth a line, by name (backends, tokens, types).
    """

    judged: str
    model: str
    mode: str
    kv_type: str
    positions: int
    passes: int
    limit: float
    limit_source: str
    operations: tuple[Operation, ...]
    floor: float | None = None
    findings: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()
    elements: tuple[Element, ...] = ()
    graft: tuple[Graft, ...] = ()
    graft_from: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.wrong and not self.findings and all(element.right for element in self.elements)

    @property
    def wrong(self) -> tuple[Operation, ...]:
        """The wrong operations, in the order of the model."""
        return tuple(operation for operation in self.operations if operation.status == WRONG)
