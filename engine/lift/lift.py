"""The lift: a recorded graph as a list of steps.

A node that is the beginning of an operation of the house (`patterns`) becomes its step together with its neighbours; views become
how an operand is read; every other node becomes a step of its ggml operation. What a cache or a state leaf holds is said by
the node that writes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from checkpoints.errors import ModelError
from checkpoints.graph import CACHE, INPUT, NODE, STATE, VIEWS, WEIGHT, Graph, RecordedGraph, Size, Tensor
from checkpoints.points import order

from .. import ops
from ..ggml_ops import OPERATIONS, OpParams
from ..graph import PASSES, POSITIONS, TOKENS, History, Read, RowsOf, State, Step, View, WeightPart, name_of
from . import inputs
from .node import GgmlOperation, Operand
from .operands import ONE, ZERO, Memory, Unliftable, contiguous, numpy_shape, product, times
from .patterns import PATTERNS

_COPIES = frozenset({"CPY", "DUP", "CONT"})


@dataclass(frozen=True)
class Lifted:
    """The steps of a model: of a pass over several tokens, and of one over a single token where that is another list."""

    several: tuple[Step, ...]
    single: tuple[Step, ...] | None = None


def lift(recording: RecordedGraph) -> Lifted:
    """The steps of a recorded graph.

    Raises:
        ModelError: an operation that the engine lacks, an input that follows no rule, or a node that cannot be read as steps; the
            message names it and its layer.
    """
    several = Lifter(recording, recording.several).steps()
    single = None if recording.single is None else tuple(Lifter(recording, recording.single, single=True).steps())
    return Lifted(tuple(several), single)


class Lifter:
    """One graph on its way to steps. Patterns use its methods."""

    def __init__(self, recording: RecordedGraph, graph: Graph, *, single: bool = False) -> None:
        self.recording, self.graph, self.tensors = recording, graph, graph.tensors
        self.memory = Memory(graph, single=single)
        self.t: Size = self.memory.t
        caches = any(tensor.kind == CACHE for tensor in graph.tensors)
        self.s: Size = Size(0, 0, 1) if caches else self.t  # the number of keys
        self.keys: Read = History(POSITIONS) if caches else POSITIONS  # and their positions
        self.names: dict[int, str] = {}  # node -> the value that a step makes of it
        self.done: set[int] = set()  # nodes that are a part of an earlier node's step
        self.written: dict[int, tuple[str, Size]] = {}  # cache leaf -> the value whose rows it holds, and their width
        self.cells: dict[int, int] = {}  # cache leaf -> its number of cells
        self._made: list[Step] = []
        self._taken: set[str] = set()
        self._left: dict[int, list[tuple[int, Read]]] = {}  # state leaf -> where what is left in it begins, and what it is

    def steps(self) -> list[Step]:
        """All steps, in the order of the vocabulary where the graph allows it."""
        for index, tensor in enumerate(self.tensors):
            if tensor.kind == NODE and tensor.op in VIEWS and tensor.point:
                self.memory.own.add(index)
        for index, tensor in enumerate(self.tensors):
            if tensor.kind != NODE or index in self.done:
                continue
            try:
                self._lift(index, tensor)
            except Unliftable as error:
                raise self.refused(index, str(error)) from error
            for name, start, stop in tensor.parts if index in self.names else ():
                self._part(index, name, start, stop)
        self._leave_states()
        return _ordered(_without_unread(self._made))

    def refused(self, index: int, why: str) -> ModelError:
        """The one line that says which node cannot be lifted."""
        tensor = self.tensors[index]
        where = tensor.point or tensor.name
        return ModelError(
            f"our engine cannot compute {tensor.op} at {where} of {self.recording.architecture}: {why}.",
            "`parity dump ref` and `parity diff` take the model.",
            code="operation",
        )

    def _lift(self, index: int, tensor: Tensor) -> None:
        if tensor.op in VIEWS:
            if index in self.memory.own:
                self._own_view(index, tensor)
            return
        if any(size == ZERO for size in tensor.ne):  # of the sequences that are not there
            return
        if self._writes(index, tensor) or self._selects(index, tensor):
            return
        for pattern in PATTERNS.get(tensor.op, ()):
            if pattern(self, index, tensor):
                return
        self.generic(index, tensor)

    # What is made

    def make(self, index: int, step: Step, *parts: int) -> None:
        """Take a step as what makes node `index`; `parts` are the nodes that it computes as well."""
        self._made.append(step)
        self._taken.add(step.makes)
        self.names[index] = step.makes
        self.done.update((index, *parts))

    def _make_rows(self, index: int, step: Step) -> None:
        """Take a step as what makes node `index`. Where its positions are an inner dimension, the point is a step that puts them first."""
        shape, axis = self.memory.layout(index)
        if step.inner or axis is None or axis == 0 or len(shape) == 3:
            self.make(index, step)
            return
        value = replace(step, makes=f"{step.makes}.ggml", axis=None, inner=True)
        self.make(index, value)
        strides = contiguous(shape)
        first = (axis, *(i for i in range(len(shape)) if i != axis))
        read = View(value.makes, shape, tuple(shape[i] for i in first), tuple(strides[i] for i in first))
        self._made.append(Step(step.makes, ops.positions_first, (read,)))
        self._taken.add(step.makes)

    def helper(self, step: Step) -> str:
        """A step for a value that is no node; made once."""
        if step.makes not in self._taken:
            self._made.append(step)
            self._taken.add(step.makes)
        return step.makes

    def name(self, index: int) -> str:
        """The name of the value of a node."""
        return self.tensors[index].point or f"node.{index}"

    def only_reader(self, index: int) -> int | None:
        """The one node that reads this one; None if several do."""
        readers = self.graph.consumers.get(index, ())
        return readers[0] if len(readers) == 1 else None

    def is_weight(self, index: int | None) -> bool:
        """Whether an operand is a tensor of the file, as it is."""
        return index is not None and self.tensors[index].kind == WEIGHT

    def rule(self, index: int | None) -> str:
        """The rule of an input ("" for what is none)."""
        if index is None or self.tensors[index].kind != INPUT:
            return ""
        found = self.tensors[index].rule
        return "" if found is None else found.kind

    # What is read

    def value(self, index: int) -> str | None:
        """The name of the value that a tensor shows as a whole; None if it shows a part of one, or none."""
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
            raise Unliftable(f"it reads {self.tensors[base].name}, which is not made by a step")
        shape, strides = numpy_shape(tensor.ne), self.memory.strides(index)
        rows, inner = _rows(shape, strides, self.t)
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

    def read(self, index: int) -> tuple[Read, tuple[Size, ...], tuple[Size, ...]]:
        """A tensor in ggml's four dimensions: how a step reads it, the shape of that, and the four dimensions."""
        tensor = self.tensors[index]
        shape = numpy_shape(tensor.ne)
        place = self.memory.place(index)
        base = self.tensors[place.base]
        if base.kind == CACHE:
            return self.history(index), shape, shape
        if base.kind == STATE:
            return self.state(index), shape, shape
        if base.kind == INPUT:
            name, whole = inputs.read(self, place.base, base)
            if self.memory.whole(index):
                return name, whole, shape
            return self.memory.view(index, name, whole), shape, shape
        whole = self.memory.layout(place.base)[0]
        if place.base not in self.names:
            raise Unliftable(f"it reads {base.name!r}, which is not made by a step")
        name = self.names[place.base]
        if self.memory.whole(index):
            return name, whole, shape
        return self.memory.view(index, name, whole), shape, shape

    def history(self, index: int) -> View:
        """What is read of a cache: rows of all positions, with one position a row however llama.cpp stores them."""
        tensor, place = self.tensors[index], self.memory.place(index)
        leaf = place.base
        if leaf not in self.written:
            raise Unliftable(f"it reads {self.tensors[leaf].name}, which nothing was written to")
        name, width = self.written[leaf]
        cells = self.cells.get(leaf, 0)
        offset = place.offset.fixed // 4
        strides = []
        for size, stride in zip(tensor.ne, tensor.nb, strict=True):
            if size == ONE:
                strides.append(ZERO)
            elif not stride.constant:
                raise Unliftable("its view of the cache follows the length")
            elif cells:  # a row of the cache is a channel
                strides.append(width if stride.fixed == 4 else Size(stride.fixed // 4 // cells))
            else:
                strides.append(Size(stride.fixed // 4))
        if cells:
            if offset % cells:
                raise Unliftable("its view of the cache begins behind the first cell")
            offset //= cells
        return View(History(name), (Size(0, 0, 1), width), numpy_shape(tensor.ne), tuple(reversed(strides)), Size(offset))

    def state(self, index: int) -> View:
        """What is read of a recurrent state: as the last pass left it."""
        leaf = self.memory.place(index).base
        size = product(numpy_shape(self.tensors[leaf].ne))
        if not size.constant:
            raise Unliftable("its state follows the length")
        name = self.helper(
            Step(
                f"state.{self.tensors[leaf].name}",
                ops.part,
                (State(self._next_state(leaf), (size.fixed,)),),
                axis=None,
                inner=True,
            )
        )
        return self.memory.view(index, name, (size,))

    def _next_state(self, leaf: int) -> str:
        return f"next.{self.tensors[leaf].name}"

    # Nodes that are no operation of their own

    def _own_view(self, index: int, tensor: Tensor) -> None:
        """A view that is a point: a copy of what it shows."""
        self.memory.own.discard(index)
        try:
            base = self.memory.place(index).base
            if base not in self.names:
                return
            whole, axis = self.memory.layout(index)
            if axis == 0:
                try:
                    self.make(index, Step(tensor.point, ops.part, (self.rows(index),)))
                except Unliftable:  # heads with gaps between them
                    shape, strides = numpy_shape(tensor.ne), self.memory.strides(index)
                    first = shape.index(whole[0])
                    view = self.memory.view(
                        index, self.names[base], self.memory.layout(base)[0], shape[first:], strides[first:]
                    )
                    self.make(index, Step(tensor.point, ops.positions_first, (view,)))
            else:
                read, _, _ = self.read(index)
                view = read if isinstance(read, View) else self.memory.view(index, name_of(read), self.memory.layout(base)[0])
                self._make_rows(index, Step(tensor.point, ops.part, (view,), axis=axis))
        finally:
            if index in self.names:
                self.memory.own.add(index)

    def _part(self, index: int, name: str, start: int, stop: int) -> None:
        """A point that is a part of each row of a value."""
        whole, axis = self.memory.layout(index)
        if axis != 0 or len(whole) != 2:
            raise Unliftable(f"{name} is a part of what is no row")
        view = View(self.names[index], whole, (self.t, Size(stop - start)), (whole[1], ONE), Size(start))
        self.helper(Step(name, ops.part, (view,)))

    def _writes(self, index: int, tensor: Tensor) -> bool:
        """Whether a node writes into a cache or a state; then what it writes is noted."""
        if tensor.op not in ("SET_ROWS", "CPY") or tensor.root is None:
            # A state set to zero before the first pass is one that a pass finds empty anyway.
            return tensor.root is not None and self.tensors[self.graph.root_of(index)].kind == STATE
        root = self.graph.root_of(index)
        kind = self.tensors[root].kind
        if kind == STATE:
            self._write_state(index, tensor, root)
            return True
        if kind == NODE and tensor.op == "SET_ROWS" and not self._read_after(root, index):
            return False  # a value of its own: nothing reads the other one afterwards
        if kind != CACHE or tensor.op != "SET_ROWS":
            raise Unliftable("it writes into another value")
        source, ids = tensor.sources[0], tensor.sources[1]
        assert source is not None
        rule = self.tensors[ids].rule if ids is not None else None
        if rule is None or rule.kind not in ("cells", "cells_transposed"):
            raise Unliftable("the cells that it writes follow no rule")
        # Transposed or not, the rows are the source's before it was cut into single elements.
        if rule.kind == "cells_transposed":
            self.cells[root] = int(rule.parameters["cells"])
        width = self.tensors[root].ne[0]
        base = self.memory.place(source).base
        name = self.value(source)
        if name is None or self.memory.layout(base)[0] != (self.t, width):
            shown = self.memory.view(source, self.names[base], self.memory.layout(base)[0])
            if product(shown.shape) != times(self.t, width):
                raise Unliftable("it writes rows of another width than the cache's")
            rows, inner = _rows(shown.shape, shown.strides, self.t) if self.tensors[source].ne[0] != ONE else (width, ONE)
            name = self.helper(
                Step(
                    f"rows.{self.tensors[root].name}",
                    ops.part,
                    (replace(shown, shape=(self.t, width), strides=(rows, inner)),),
                    inner=True,
                )
            )
        self.written[root] = (name, width)
        self.done.add(index)
        return True

    def _read_after(self, base: int, writer: int) -> bool:
        """Whether a node reads a value, itself or through views, after another has written into it."""
        for reader in self.graph.consumers.get(base, ()):
            if reader == writer:
                continue
            if self._read_after(reader, writer) if self.tensors[reader].op in VIEWS else reader > writer:
                return True
        return False

    def _write_state(self, index: int, tensor: Tensor, root: int) -> None:
        """Note what a node leaves in a state; the steps that do it come after all others."""
        source = tensor.sources[0]
        assert source is not None
        read, _, _ = self.read(source)
        start = tensor.offset.divided(4)
        if tensor.op != "CPY" or not (start.constant and product(tensor.ne).constant):
            raise Unliftable("what it leaves in the state follows the length")
        self._left.setdefault(root, []).append((start.fixed, read))
        if tensor.point:  # a row that belongs to the last position
            self.helper(Step(tensor.point, ops.flat, (read,), axis=None))
        self.done.add(index)

    def _leave_states(self) -> None:
        """The steps that put a state's new parts together, in the order in which they are written."""
        for leaf, parts in self._left.items():
            last = self._next_state(leaf)
            size = product(numpy_shape(self.tensors[leaf].ne)).fixed
            before: Read = State(last, (size,))
            for number, (start, read) in enumerate(parts, 1):
                name = last if number == len(parts) else f"{last}.{number}"
                self._made.append(
                    Step(name, ops.left_in_state, (before, read), (), {"start": start, "size": size}, axis=None, inner=True)
                )
                before = name

    def _selects(self, index: int, tensor: Tensor) -> bool:
        """Whether a node only takes all rows again, as the last layer does for the rows whose logits were asked for."""
        if tensor.op != "GET_ROWS":
            return False
        source, ids = tensor.sources[0], tensor.sources[1]
        assert source is not None
        assert ids is not None
        base = self.memory.place(source).base
        whole_state = self.tensors[base].kind == STATE and self.rule(self.memory.place(ids).base) == "zero"
        if whole_state:
            self.memory.same[index] = source
            return True
        if self.rule(ids) == "rows" and self.tensors[source].kind == NODE and self.memory.whole(source) and base in self.names:
            self.memory.same[index] = source
            return True
        return False

    # Everything else

    def generic(self, index: int, tensor: Tensor) -> None:
        """A step of the node's own ggml operation."""
        if tensor.op not in OPERATIONS:
            raise Unliftable("it has no such operation")
        if tensor.op == "TOP_K" and (source := tensor.sources[0]) is not None and not self.tensors[source].ne[0].constant:
            raise Unliftable("it chooses among cached positions, of which llama.cpp's padding is a part")
        reads: list[Read] = []
        weights: list[str | RowsOf | WeightPart] = []
        found: list[tuple[str, int, tuple[Size, ...], tuple[Size, ...] | None] | None] = []
        for number, source in enumerate(tensor.sources):
            if source is None:
                found.append(None)
                continue
            place = self.memory.place(source)
            if self.tensors[place.base].kind == WEIGHT:
                found.append(self._weight(tensor, source, number, weights))
                continue
            if tensor.op in _COPIES and number == 1:  # the target, which gives only its shape
                found.append(None)
                continue
            if tensor.op == "FILL":  # the operand gives only its shape
                found.append(("read", len(reads), (self.t,), (self.t,)))
                reads.append(POSITIONS)
                continue
            if number in tensor.operand_points:
                found.append(("read", len(reads), *self.operand_point(index, tensor, number, reads)))
                continue
            read, whole, shape = self.read(source)
            found.append(("read", len(reads), whole, shape))
            reads.append(read)
        made, axis = self.memory.layout(index)
        shape = numpy_shape(tensor.ne)
        positions = None
        if any(not size.constant for size in shape) and not any(
            entry and any(not size.constant for size in entry[2]) for entry in found
        ):
            positions = len(reads)
            reads.append(POSITIONS)
        operands = tuple(
            None if entry is None else Operand(entry[1] + (len(reads) if entry[0] == "weight" else 0), entry[2], entry[3])
            for entry in found
        )
        params = {"params": OpParams(tensor.params, tensor.type), "operands": operands, "shape": shape, "made": made}
        if positions is not None:
            params["positions"] = positions
        inner = not tensor.point or (axis is None and len(made) != 2)  # without a row for each position, or one for all
        self._make_rows(
            index,
            Step(self.name(index), GgmlOperation(tensor.op), tuple(reads), tuple(weights), params, axis=axis, inner=inner),
        )

    def _weight(
        self, tensor: Tensor, source: int, number: int, weights: list[str | RowsOf | WeightPart]
    ) -> tuple[str, int, tuple[Size, ...], tuple[Size, ...] | None]:
        base = self.memory.place(source).base
        info, shown = self.tensors[base], self.tensors[source]
        shape = numpy_shape(shown.ne)
        entry = ("weight", len(weights), shape, shape)
        if source == base and tensor.op == "GET_ROWS" and number == 0 and info.ne[2] == info.ne[3] == ONE:
            weights.append(RowsOf(info.name))
            return ("weight", entry[1], shape, None)
        if self.memory.whole(source):
            weights.append(info.name)
        else:
            view = self.memory.view(source, info.name, numpy_shape(info.ne))
            weights.append(
                WeightPart(
                    info.name, tuple(s.fixed for s in view.shape), tuple(s.fixed for s in view.strides), view.offset.fixed
                )
            )
        return entry

    def operand_point(
        self, index: int, tensor: Tensor, number: int, reads: list[Read]
    ) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
        """An operand that is a point of its own: keys or values as attention reads them. Its step is made, and read."""
        read = self.attended(index, tensor, number)
        reads.append(read)
        shape = numpy_shape(self.tensors[tensor.sources[number] or 0].ne)
        return shape, shape

    def attended_name(self, index: int, tensor: Tensor, *, keys: bool) -> str | None:
        """The value [S, K · d] that holds the keys or values of a product of attention; None if there is none.

        What a cache holds is shown by a step of its own; where nothing is cached, it is the keys or values of the pass.
        """
        if 0 in tensor.operand_points:
            self.attended(index, tensor, 0)
            return tensor.operand_points[0]
        source = tensor.sources[0]
        base = self.memory.place(source).base if source is not None else None
        if not keys and base is not None and self.tensors[base].op == "CONT" and self.memory.whole(source or 0):
            source = self.tensors[base].sources[0]  # llama.cpp transposes the values before the product
            base = self.memory.place(source).base if source is not None else None
        if source is None or base not in self.names:
            return None
        shape, strides = numpy_shape(self.tensors[source].ne), self.memory.strides(source)
        heads, width, seen = (shape[1], shape[3], shape[2]) if keys else (shape[1], shape[2], shape[3])
        row = times(heads, width)
        wanted = (ZERO, width, row, ONE) if keys else (ZERO, width, ONE, row)
        rows = self.memory.layout(base)[0] == (seen, row) and self.memory.place(source).offset == ZERO
        if rows and all(size == ONE or a == b for size, a, b in zip(shape, strides, wanted, strict=True)):
            return self.names[base]
        return None

    def attended(self, index: int, tensor: Tensor, number: int) -> View:
        """The keys [1, K, S, d] or values [1, K, d, S] of a product of attention, out of the step that shows them as [S, K · d]."""
        source = tensor.sources[number]
        assert source is not None
        name = tensor.operand_points[number]
        read, _, _ = self.read(source)
        shape = numpy_shape(self.tensors[source].ne)
        keys = name.endswith("k_read")
        heads, width, seen = (shape[1], shape[3], shape[2]) if keys else (shape[1], shape[2], shape[3])
        if shape[0] != ONE:
            raise Unliftable("it attends to several streams")
        of, whole, strides, offset = self._memory_of(source, read)
        by_head, by_element, by_position = (
            (strides[1], strides[3], strides[2]) if keys else (strides[1], strides[2], strides[3])
        )
        row = times(heads, width)
        dense = ONE in (width, by_element) and (heads == ONE or by_head == width)
        rows: Read
        if dense and whole == (seen, row) and offset == ZERO and by_position == row:
            rows = of
        elif dense:
            rows = View(of, whole, (seen, row), (by_position, ONE), offset)
        else:
            rows = View(of, whole, (seen, heads, width), (by_position, by_head, by_element), offset)
        self.helper(Step(name, ops.cached, (rows,)))
        if keys:
            return View(name, (seen, row), shape, (ZERO, width, row, ONE))
        return View(name, (seen, row), shape, (ZERO, width, ONE, row))

    def _memory_of(self, source: int, read: Read) -> tuple[str | History, tuple[Size, ...], tuple[Size, ...], Size]:
        if isinstance(read, View):
            return read.of, read.whole, read.strides, read.offset
        if not isinstance(read, str):
            raise Unliftable("it attends to a state")
        base = self.memory.place(source).base
        return read, self.memory.layout(base)[0], self.memory.strides(source), ZERO


def _rows(shape: Sequence[Size], strides: Sequence[Size], t: Size) -> tuple[Size, Size]:
    """The strides of a four-dimensional view as [T, n].

    Raises:
        Unliftable: a row's elements do not lie one behind the other.
    """
    axis = next((i for i, size in enumerate(shape) if size != ONE), len(shape) - 1)
    if t != ONE and shape[axis] != t:
        raise Unliftable("its rows are not the positions")
    inner = range(axis + 1, len(shape)) if t != ONE else range(axis, len(shape))
    step = ONE
    for i in reversed(inner):
        if shape[i] != ONE and strides[i] != step:
            raise Unliftable("the elements of a row do not lie one behind the other")
        step = times(step, shape[i])
    return (strides[axis] if t != ONE else ZERO), ONE


def _without_unread(steps: list[Step]) -> list[Step]:
    """The steps without inner ones that nothing reads."""
    kept: list[Step] = []
    wanted = {read.of for step in steps for read in step.reads if isinstance(read, State)}
    for step in reversed(steps):
        if step.inner and step.makes not in wanted:
            continue
        kept.append(step)
        wanted.update(step.names)
    return kept[::-1]


def _ordered(steps: list[Step]) -> list[Step]:
    """The steps in the vocabulary's order where each still comes after what it reads, else in the graph's."""
    by_name = {step.makes: step for step in steps}
    place = {name: number for number, name in enumerate(order([step.makes for step in steps if not step.inner]))}
    result: list[Step] = []
    made = {TOKENS, POSITIONS, PASSES}

    def put(step: Step) -> None:
        for name in step.names:
            if name not in made:
                put(by_name[name])
        if step.makes not in made:
            made.add(step.makes)
            result.append(step)

    for step in sorted((step for step in steps if not step.inner), key=lambda step: place[step.makes]):
        put(step)
    for step in steps:
        put(step)
    return result
