"""llama.cpp's graph of a model, if no reference is running yet."""

from pathlib import Path

from checkpoints.graph import RecordedGraph
from reference.client import Reference


def recorded_graph(model: Path) -> RecordedGraph:
    """The graph, recorded by a reference that is started for this.

    Raises:
        ModelError, ReferenceFailed: as `Reference.graph`.
    """
    with Reference() as reference:
        return reference.graph(model)
