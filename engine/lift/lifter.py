"""The lifter: a graph while it is being lifted, and how any of its tensors is read, inputs and kept values included."""

from checkpoints.graph import CACHE, INPUT, STATE, Size

from ..graph import Read
from . import inputs
from .kept import history, state
from .lifted import GraphLifter
from .operands import Unliftable, numpy_shape


class Lifter(GraphLifter):
    """One graph while it is turned into steps. Patterns use its methods."""

    def read(self, index: int) -> tuple[Read, tuple[Size, ...], tuple[Size, ...]]:
        """A tensor in ggml's four dimensions: how a step reads it, the shape that it reads, and the four dimensions."""
        tensor = self.tensors[index]
        shape = numpy_shape(tensor.ne)
        place = self.memory.place(index)
        base = self.tensors[place.base]
        if base.kind == CACHE:
            return history(self, index), shape, shape
        if base.kind == STATE:
            return state(self, index), shape, shape
        if base.kind == INPUT:
            name, whole = inputs.read(self, base)
            if self.memory.whole(index):
                return name, whole, shape
            return self.memory.view(index, name, whole), shape, shape
        whole = self.memory.layout(place.base)[0]
        if place.base not in self.names:
            raise Unliftable(f"it reads {base.name!r}, which no step computes")
        name = self.names[place.base]
        if self.memory.whole(index):
            return name, whole, shape
        return self.memory.view(index, name, whole), shape, shape
