"""llama.cpp's graph of a model, and its dataflow, from a reference that is started for this."""

from pathlib import Path

from checkpoints.dataflow import Dataflow
from checkpoints.errors import ParityError
from checkpoints.graph import RecordedGraph
from engine.opened import Recording
from engine.transformer import Transformer
from reference.client import Reference
from reference.jobs import NATIVE


def recorded_graph(model: Path) -> RecordedGraph:
    """The graph of a model.

    Raises:
        ModelError, ReferenceFailed: as in `Reference.graph`.
    """
    with Reference() as reference:
        return reference.graph(model)


def not_as_the_file_says(transformer: Transformer, recorded: Recording | None = None) -> tuple[str, ...]:
    """What the metadata say and llama.cpp computes otherwise, a sentence each.

    Where the model's steps are written by hand, the graph is recorded for this: by `recorded`, or by a reference that is started.
    """
    from engine.ignored import sentences

    graph = transformer.recorded
    if graph is None:
        try:
            graph = recorded() if recorded is not None else _as_it_is(transformer.model.path)
        except ParityError:
            return ()
    return sentences(graph, transformer.model.metadata)


def _as_it_is(model: Path) -> RecordedGraph:
    """The graph of a model in the file's own types, which has the same parameters and needs no twin."""
    with Reference() as reference:
        return reference.graph(model, NATIVE)


def dataflow_of(model: Path) -> Dataflow:
    """What the points of llama.cpp's graph are made from.

    Raises:
        ModelError, ReferenceFailed: as in `Reference.describe`.
    """
    with Reference() as reference:
        return reference.describe(model).dataflow
