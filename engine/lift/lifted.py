"""A graph while it is being lifted: the steps so far, the values that they make, and how a tensor is read from those."""

from msgspec.structs import replace

from checkpoints.errors import ModelError
from checkpoints.graph import CACHE, INPUT, WEIGHT, Graph, RecordedGraph, Size, Tensor

from .. import ops
from ..graph import POSITIONS, History, Read, Step, View
from .operands import ONE, TensorLayouts, Unliftable, contiguous, numpy_shape, product, row_strides


class GraphLifter:
    """One graph while it is being turned into steps: the steps so far, and how the values of nodes are read."""

    def __init__(self, recording: RecordedGraph, graph: Graph, *, single: bool = False) -> None:
        self.recording, self.graph, self.tensors = recording, graph, graph.tensors
        self.memory = TensorLayouts(graph, single=single)
        self.t: Size = self.memory.t
        caches = any(tensor.kind == CACHE for tensor in graph.tensors)
        self.s: Size = Size(0, 0, 1) if caches else self.t  # the number of keys
        self.keys: Read = History(POSITIONS) if caches else POSITIONS  # and their positions
        self.names: dict[int, str] = {}  # node -> the value that stands for it
        self.done: set[int] = set()  # nodes that are part of an earlier node's step
        self.written: dict[int, tuple[str, Size]] = {}  # cache leaf -> the value whose rows it holds, and their width
        self.cells: dict[int, int] = {}  # cache leaf -> its number of cells
        self.added_steps: list[Step] = []
        self.taken: set[str] = set()
        # State leaf -> the parts that are written: where each begins, and what it is.
        self.left: dict[int, list[tuple[int, Read]]] = {}

    def refused(self, index: int, why: str) -> ModelError:
        """The error, one line, that says which node cannot be lifted and why."""
        tensor = self.tensors[index]
        where = tensor.point or tensor.name
        return ModelError(
            f"our engine cannot compute {tensor.op} at {where} of {self.recording.architecture}: {why}.",
            "`parity dump ref` and `parity diff` accept the model.",
            code="operation",
        )

    # Adding steps

    def make(self, index: int, step: Step, *parts: int) -> None:
        """Add the step that makes node `index`; `parts` are further nodes that it computes."""
        self.added_steps.append(step)
        self.taken.add(step.makes)
        self.names[index] = step.makes
        self.done.update((index, *parts))

    def make_rows(self, index: int, step: Step) -> None:
        """Add the step that makes node `index`. If positions are an inner dimension, a further step, the point, puts them first."""
        shape, axis = self.memory.layout(index)
        if step.inner or axis is None or axis == 0 or len(shape) == 3:
            self.make(index, step)
            return
        value = replace(step, makes=f"{step.makes}.ggml", axis=None, inner=True)
        self.make(index, value)
        strides = contiguous(shape)
        first = (axis, *(i for i in range(len(shape)) if i != axis))
        read = View(value.makes, shape, tuple(shape[i] for i in first), tuple(strides[i] for i in first))
        self.added_steps.append(Step(step.makes, ops.positions_first, (read,)))
        self.taken.add(step.makes)

    def add_value(self, step: Step) -> str:
        """Add the step of a value that is no node, once, and return the value's name."""
        if step.makes not in self.taken:
            self.added_steps.append(step)
            self.taken.add(step.makes)
        return step.makes

    def name(self, index: int) -> str:
        """The name of the value of a node."""
        return self.tensors[index].point or f"node.{index}"

    def only_reader(self, index: int) -> int | None:
        """The one node that reads this one; None if several do."""
        readers = self.graph.consumers.get(index, ())
        return readers[0] if len(readers) == 1 else None

    def is_weight(self, index: int | None) -> bool:
        """Whether an operand is a tensor of the file, unchanged."""
        return index is not None and self.tensors[index].kind == WEIGHT

    def rule(self, index: int | None) -> str:
        """The rule of an input ("" for anything else)."""
        if index is None or self.tensors[index].kind != INPUT:
            return ""
        rule_of = self.tensors[index].rule
        return "" if rule_of is None else rule_of.kind

    # What is read

    def value(self, index: int) -> str | None:
        """The name of the value that a tensor shows completely; None if it shows a part of one, or none."""
        base = self.memory.place(index).base
        return self.names.get(base) if self.memory.whole(index) else None

    def rows(self, index: int) -> Read:
        """A tensor as [T, n].

        Raises:
            Unliftable: its rows are not the positions.
        """
        tensor = self.tensors[index]
        base = self.memory.place(index).base
        n = self._width(tensor)
        name = self.value(index)
        if name is not None and self.memory.layout(base)[0] == (self.t, n):
            return name
        if base not in self.names:
            raise Unliftable(f"it reads {self.tensors[base].name}, which no step computes")
        shape, strides = numpy_shape(tensor.ne), self.memory.strides(index)
        rows, inner = row_strides(shape, strides, self.t)
        return self.memory.view(index, self.names[base], self.memory.layout(base)[0], (self.t, n), (rows, inner))

    def _width(self, tensor: Tensor) -> Size:
        """n of a tensor that is [T, n]."""
        ne = tensor.ne
        axes = [axis for axis in range(4) if ne[axis] == self.t and all(size == ONE for size in ne[axis + 1 :])]
        if self.t == ONE:
            return product(ne)
        if not axes or not all(size.constant for size in ne[: axes[0]]):
            raise Unliftable("its rows are not the positions")
        return product(ne[: axes[0]])
