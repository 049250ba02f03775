"""llama.cpp's graph of a model, and its dataflow, from a reference that is started for this."""

from pathlib import Path

from checkpoints.dataflow import Dataflow
from checkpoints.graph import RecordedGraph
from reference.client import Reference


def recorded_graph(model: Path) -> RecordedGraph:
    """The graph of a model.

    Raises:
        ModelError, ReferenceFailed: as in `Reference.graph`.
    """
    with Reference() as reference:
        return reference.graph(model)


def dataflow_of(model: Path) -> Dataflow:
    """What the points of llama.cpp's graph are made from.

    Raises:
        ModelError, ReferenceFailed: as in `Reference.describe`.
    """
    with Reference() as reference:
        return reference.describe(model).dataflow
