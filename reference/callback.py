"""The callback that llama.cpp calls while it computes: it lists a graph's nodes, or takes their values.

`ggml_backend_sched_eval_callback` asks about each node (`ask`) and calls again with those that were wanted. ctypes would swallow
an exception in it: it is kept, the computation is stopped, and `check` raises it afterwards.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .ggml import COMPUTED, Ggml, GgmlTensor, first_operand
from .jobs import Node, Outline
from .naming import Planned, Signature, Signer

Noted = TypeVar("Noted", Node, Outline)
Deliver = Callable[[Planned, NDArray[np.float32]], None]


class Tap:
    """The callback of one context.

    Call `list_nodes` or `take` before a decode, `check` after it. With nothing to take, the callback returns at once.
    """

    def __init__(self, ggml: Ggml) -> None:
        self._ggml = ggml
        self._listing: list[tuple[Node, bool]] | None = None
        self._outlines: list[tuple[Outline, bool]] | None = None
        self.causal = True  # whether the masks of the last listed pass hide every later position
        self._masks: dict[int, bytes] = {}  # the masks of the last listed pass, by the address of their soft max
        self._marked = False  # whether this llama.cpp marks the nodes that it computes
        self._wanted: dict[Signature, list[Planned]] = {}
        self._deliver: Deliver | None = None
        self._signer = Signer()
        self._current: list[Planned] = []
        self._failure: BaseException | None = None
        self._record: Callable[[int], None] | None = None
        self._skipping = False
        self._opening: tuple[str, str, str] | None = None  # the first node of a pass's graph
        self._next: Callable[[], Iterable[Planned]] | None = None

    @property
    def stop(self) -> bool:
        """Whether the computation can stop, because nothing more will be taken from it."""
        return any(wanted is not None for wanted in (self._failure, self._listing, self._outlines, self._record))

    def list_nodes(self) -> None:
        """During the next pass, only note the nodes."""
        self._reset()
        self._listing = []
        self.causal = True
        self._masks = {}

    def listed(self) -> list[Node]:
        """The nodes noted, in the order of computation, without those that are in the graph but not computed.

        A graph may hold both an embedding of tokens and one of hidden states, and select one of the two.
        """
        noted = self._listing or []
        self._marked = any(marked for _, marked in noted)
        return _computed_of(noted)

    def outline(self) -> None:
        """During the next pass only note what finds the nodes again, and their shapes."""
        self._reset()
        self._outlines = []

    def outlined(self) -> list[Outline]:
        """The outlines noted, of the same nodes as `listed`."""
        return _computed_of(self._outlines or [])

    def record(self, record_node: Callable[[int], None]) -> None:
        """During the next pass, give every node's address to `record_node` and compute nothing."""
        self._reset()
        self._record = record_node

    def skip(self) -> None:
        """Leave the next pass after its first node; llama.cpp then regards it as computed."""
        self._reset()
        self._skipping = True

    def masks_of(self, nodes: Sequence[Node]) -> list[bytes]:
        """The mask that each node of the last listing applies, b"" for a node without one."""
        return [self._masks.get(node.address, b"") for node in nodes]

    def take(
        self,
        wanted: Iterable[Planned],
        deliver: Deliver | None,
        again: Callable[[], Iterable[Planned]] | None = None,
    ) -> None:
        """During the next pass, give each wanted value to `deliver` as soon as it is computed.

        `again` is called when llama.cpp begins a further ubatch of the pass; it returns the values that are wanted from it.
        """
        self._reset()
        self._next = again
        if deliver is not None:
            for planned in wanted:
                self._wanted.setdefault(planned.signature, []).append(planned)
            self._deliver = deliver

    def _reset(self) -> None:
        self._listing, self._outlines, self._deliver, self._failure, self._record = None, None, None, None, None
        self._skipping = False
        self._wanted = {}
        self._signer = Signer()
        self._opening = self._next = None

    @property
    def _idle(self) -> bool:
        return self._deliver is None and self._listing is None and self._outlines is None

    def check(self) -> None:
        """Raise what was raised inside the callback."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __call__(self, address: int, ask: bool, _data: int | None) -> bool:
        """`ggml_backend_sched_eval_callback`: whether the node is wanted; always True once its value was seen."""
        if self._skipping:
            return ask
        if self._record is not None and ask and self._failure is None:
            try:
                self._record(address)
            except BaseException as error:
                self._failure = error
            return False
        if self._failure is not None or self._idle:
            return not ask
        try:
            if ask:
                return self._wants_value(address)
            self._computed(address)
        except BaseException as error:
            self._failure = error
            return not ask
        return True

    def _wants_value(self, address: int) -> bool:
        tensor = self._ggml.tensor(address)
        if self._outlines is not None:
            self._outlines.append((self._ggml.outline(tensor), bool(tensor.flags & COMPUTED)))
            return False
        if self._listing is not None:
            self._listing.append((self._ggml.node(address), bool(tensor.flags & COMPUTED)))
            if self._ggml.op_name(tensor.op) == "SOFT_MAX" and tensor.src[1] and self._given(tensor.src[1].contents):
                mask = self._ggml.read(tensor.src[1].contents)
                self.causal = self.causal and not _shows_later(mask[0, 0], tensor.ne[1])
                self._masks[address] = mask.tobytes()
            return False
        if self._marked and not tensor.flags & COMPUTED:
            self._current = []
            return False
        first = first_operand(tensor)
        name = tensor.name.decode(errors="replace")
        op = self._ggml.op_name(tensor.op)
        if self._next is not None:
            self._count_ubatches((name, op, first))
        self._current = self._wanted.get(self._signer.sign(name, op, first), [])
        return bool(self._current)

    def _count_ubatches(self, node: tuple[str, str, str]) -> None:
        """Notice the next ubatch: its graph begins with the first node again."""
        if self._opening is None:
            self._opening = node
        elif node == self._opening and self._next is not None:
            self._signer, self._wanted = Signer(), {}
            for planned in self._next():
                self._wanted.setdefault(planned.signature, []).append(planned)

    def _given(self, tensor: GgmlTensor) -> bool:
        """Whether a tensor has its data before the pass, unlike a mask that sparse attention computes."""
        root = tensor.view_src.contents if tensor.view_src else tensor
        return self._ggml.op_name(root.op) == "NONE"

    def _computed(self, address: int) -> None:
        if self._deliver is None:
            return
        tensor = self._ggml.tensor(address)
        for planned in self._current:
            source = tensor if planned.operand is None else tensor.src[planned.operand].contents
            self._deliver(planned, self._ggml.read(source))


def _computed_of(noted: Sequence[tuple[Noted, bool]]) -> list[Noted]:
    """The notes on the nodes that are computed; on all nodes if this llama.cpp marks none."""
    some = any(marked for _, marked in noted)
    return [node for node, marked in noted if marked or not some]


def _shows_later(mask: NDArray[np.float32], count: int) -> bool:
    """Whether a mask [T, S] over an empty cache lets one of `count` positions see a later one."""
    later = np.triu(np.ones((count, count), dtype=np.bool_), 1)
    square = mask[:count, :count]
    return square.shape == later.shape and bool(np.isfinite(square[later]).any())
