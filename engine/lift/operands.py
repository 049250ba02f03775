"""How a node's operands are read: which value owns the memory, and which of its elements are read in which order."""

from collections.abc import Sequence

from msgspec import Struct

from checkpoints.graph import CACHE, NODE, VIEWS, WEIGHT, Graph, Size, Sizes, Tensor
from checkpoints.points import of_scores

from ..graph import History, View

ONE, ZERO = Size(1), Size(0)
ITEM = {"f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i64": 8}


class Unliftable(Exception):
    """A node cannot be turned into a step; the text says why."""


class Storage(Struct, frozen=True):
    """The memory that a tensor shows: node `base` owns it, `offset` counts bytes from its start."""

    base: int
    offset: Size


def product(sizes: tuple[Size, ...]) -> Size:
    """The number of elements of a shape.

    Raises:
        Unliftable: it grows faster than T², or with S².
    """
    fixed, total = 1, ONE
    for size in sizes:
        if size.constant:
            fixed *= size.fixed
        else:
            total = times(total, size)
    return times(total, Size(fixed))


def times(a: Size, b: Size) -> Size:
    """a · b.

    Raises:
        Unliftable: it grows faster than T², or with S².
    """
    if ONE in (a, b):
        return b if a == ONE else a
    if a.constant:
        return Size(a.fixed * b.fixed) if b.constant else Size(*(a.fixed * number for number in b))
    if b.constant:
        return Size(*(b.fixed * number for number in a))
    if any((*a[3:5], *b[3:5], a.crossed, b.crossed)) or any(a[i] and b[j] for i in (2, 5) for j in (2, 5)):
        raise Unliftable("its size grows with a power of the length")
    return Size(
        a.fixed * b.fixed,
        a.fixed * b.tokens + a.tokens * b.fixed,
        a.fixed * b.cached + a.cached * b.fixed,
        a.tokens * b.cached + a.cached * b.tokens,
        a.tokens * b.tokens,
        a.fixed * b.encoded + a.encoded * b.fixed,
        a.tokens * b.encoded + a.encoded * b.tokens,
    )


def contiguous(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """Strides, in elements, of an array of this shape without gaps."""
    strides: list[Size] = [ONE]
    for size in reversed(shape[1:]):
        strides.append(times(strides[-1], size))
    return tuple(reversed(strides))


def numpy_shape(ne: Sizes) -> tuple[Size, ...]:
    """ggml's four sizes in NumPy's order."""
    return tuple(reversed(ne))


class TensorLayouts:
    """Places of a graph's tensors, and the layout that each value has in the engine.

    Args:
        single: whether the graph is that of a single token's pass, where T is 1.
    """

    def __init__(self, graph: Graph, *, single: bool) -> None:
        self.tensors = graph.tensors
        self.t: Size = ONE if single else Size(0, 1)
        self._single = single
        # Where nothing is cached, the keys are the positions of the pass.
        self._square = not single and not any(tensor.kind == CACHE for tensor in graph.tensors)
        self.own: set[int] = set()  # views that are values of their own, since they are points
        self.same: dict[int, int] = {}  # node -> the node whose value it passes on unchanged

    def place(self, index: int) -> Storage:
        """The memory that a tensor shows."""
        tensor = self.tensors[index]
        start = index
        while tensor.kind == NODE and tensor.op in VIEWS and index not in self.own:
            source = tensor.sources[0]
            if source is None:
                raise Unliftable("it shows no tensor")
            index, tensor = source, self.tensors[source]
            if index in self.same:
                break
        if index in self.same:
            inner = self.place(self.same[index])
            return Storage(
                inner.base,
                _sum(
                    _difference(self.tensors[start].offset, tensor.offset if start != index else self.tensors[start].offset),
                    inner.offset,
                ),
            )
        return Storage(index, _difference(self.tensors[start].offset, tensor.offset))

    def layout(self, index: int) -> tuple[tuple[Size, ...], int | None]:
        """The shape of a node's value in the engine, and its position axis.

        [T, n] where the positions are the slowest dimension; attention's scores [H, T, S]; else ggml's four dimensions.
        """
        tensor = self.tensors[index]
        ne = tensor.ne
        keys = ne[0].cached or (self._square and ne[0] == self.t)
        if keys and ne[1] == self.t and ne[3] == ONE and (not tensor.point or of_scores(tensor.point) or self.padded(index)):
            return (ne[2], ne[1], ne[0]), 1
        if self._single:
            return ((ONE, product(ne)), 0) if all(size.constant for size in ne) else (numpy_shape(ne), None)
        axis = tensor.position_axis
        if axis is None:
            once = tensor.point and tensor.op not in VIEWS and all(size.constant for size in ne)
            return ((ONE, product(ne)) if once else _pairs_apart(numpy_shape(ne))), None
        if all(size == ONE for size in ne[axis + 1 :]):
            return (ne[axis], product(ne[:axis])), 0
        return numpy_shape(ne), 3 - axis

    def padded(self, index: int) -> bool:
        """Whether a value contains llama.cpp's padding: its rows are as long as the cache but no scores, or they name cells of it."""
        tensor = self.tensors[index]
        if tensor.op == "CONT" and (copied := tensor.sources[0]) is not None and self.tensors[copied].op == "TOP_K":
            tensor = self.tensors[copied]
        source = tensor.sources[0] if tensor.op == "TOP_K" else None
        chosen = source is not None and bool(self.tensors[source].ne[0].cached)
        return chosen or (tensor.kind == NODE and bool(tensor.ne[0].cached) and not of_scores(tensor.point))

    def whole(self, index: int) -> bool:
        """Whether a tensor shows all of its base's elements in their order."""
        place, tensor = self.place(index), self.tensors[index]
        base = self.tensors[place.base]
        if place.base == index and base.kind == WEIGHT:  # its strides are of blocks, not of elements
            return True
        if place.offset != ZERO or product(tensor.ne) != product(base.ne):
            return False
        shape = numpy_shape(tensor.ne)
        return all(
            size == ONE or stride == wanted
            for size, stride, wanted in zip(shape, self.strides(index), contiguous(shape), strict=True)
        )

    def strides(self, index: int) -> tuple[Size, ...]:
        """A tensor's strides in NumPy's order, in elements of its base's memory as the engine holds it.

        Raises:
            Unliftable: they are no multiples of the base's.
        """
        place, tensor = self.place(index), self.tensors[index]
        base = self.tensors[place.base]
        item = ITEM.get(base.type, 4)
        if place.base in self.own or (base.kind in (NODE, WEIGHT) and not _dense(base, item)):
            elements = [
                ZERO if size == ONE else _translated(stride, base) for size, stride in zip(tensor.ne, tensor.nb, strict=True)
            ]
        else:
            try:
                elements = [
                    ZERO if size == ONE else stride.divided(item) for size, stride in zip(tensor.ne, tensor.nb, strict=True)
                ]
            except ValueError as error:
                raise Unliftable("its strides are not whole elements") from error
        return tuple(reversed(elements))

    def view(
        self,
        index: int,
        of: str | History,
        whole: tuple[Size, ...],
        shape: tuple[Size, ...] | None = None,
        strides: tuple[Size, ...] | None = None,
    ) -> View:
        """How a tensor is read out of its base's value."""
        place = self.place(index)
        base = self.tensors[place.base]
        item = ITEM.get(base.type, 4)
        offset = place.offset
        if offset != ZERO:
            try:
                offset = offset.divided(item) if _dense(base, item) else _translated(offset, base)
            except ValueError as error:
                raise Unliftable("it starts inside an element") from error
        return View(of, whole, shape or numpy_shape(self.tensors[index].ne), strides or self.strides(index), offset)


def _pairs_apart(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The shape with T · S in one dimension (pairs of query and key) split in two: T and S do not follow from their product."""
    pairs = Size(0, product=1)
    return tuple(size for whole in shape for size in ((Size(0, 1), Size(0, 0, 1)) if whole == pairs else (whole,)))


def _dense(base: Tensor, item: int) -> bool:
    """Whether a tensor's own memory has no gaps."""
    return all(
        size == ONE or stride == Size(*(item * n for n in wanted))
        for size, stride, wanted in zip(numpy_shape(base.ne), reversed(base.nb), contiguous(numpy_shape(base.ne)), strict=True)
    )


def _translated(stride: Size, base: Tensor) -> Size:
    """A stride over memory with gaps, in elements of the same tensor without them."""
    dense = contiguous(numpy_shape(base.ne))[::-1]
    for axis in (3, 2, 1, 0):
        own = base.nb[axis]
        if base.ne[axis] == ONE or not own.constant or not own.fixed:
            continue
        if all(number % own.fixed == 0 for number in stride):
            return times(stride.divided(own.fixed), dense[axis])
    if stride == ZERO:
        return ZERO
    raise Unliftable("it shows another view's memory in another order")


def _sum(a: Size, b: Size) -> Size:
    return Size(*(x + y for x, y in zip(a, b, strict=True)))


def _difference(a: Size, b: Size) -> Size:
    return Size(*(x - y for x, y in zip(a, b, strict=True)))


def row_strides(shape: Sequence[Size], strides: Sequence[Size], t: Size) -> tuple[Size, Size]:
    """The strides of a four-dimensional view as [T, n].

    Raises:
        Unliftable: a row's elements are not evenly spaced.
    """
    axis = next((i for i, size in enumerate(shape) if size != ONE), len(shape) - 1)
    if t != ONE and shape[axis] != t:
        raise Unliftable("its rows are not the positions")
    inner = range(axis + 1, len(shape)) if t != ONE else range(axis, len(shape))
    step = ONE
    for i in reversed(inner):
        if shape[i] != ONE and strides[i] != step:
            raise Unliftable("the elements of a row are not contiguous")
        step = times(step, shape[i])
    return (strides[axis] if t != ONE else ZERO), ONE
