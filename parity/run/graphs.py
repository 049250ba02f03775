"""llama.cpp's graph of a model, where no reference runs already."""

from pathlib import Path

from checkpoints.graph import RecordedGraph
from reference.client import Reference


def recorded_graph(model: Path) -> RecordedGraph:
    """The graph, by a reference that is started for it.

    Raises:
        ModelError, ReferenceFailed: as `Reference.graph`.
    """
    with Reference() as reference:
        return reference.graph(model)
