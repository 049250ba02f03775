"""A model opened for computing: on the host, on one device, or spread over several."""

from collections.abc import Callable, Sequence

from checkpoints.graph import RecordedGraph

from .backend import choose
from .engine import Engine
from .models import written_by_hand
from .transformer import Transformer
from .weights.gguf_model import GgufModel

Recording = Callable[[], RecordedGraph]  # gives llama.cpp's graph of the model; called only where one is needed


def open_plain(
    model: GgufModel, backend: str = "auto", *, resident: bool = True, recorded: Recording | None = None
) -> Transformer:
    """Our engine on one backend; its steps and weights can be used one by one.

    Raises:
        InputError: no such backend; ModelError: as `Transformer`.
    """
    return Transformer(model, choose(backend), resident=resident, recorded=_graph(model, recorded))


def open_engine(
    model: GgufModel,
    backend: str = "auto",
    devices: Sequence[int] = (),
    *,
    resident: bool = True,
    native: bool = False,
    recorded: Recording | None = None,
) -> Engine:
    """Our engine on the backend of that name, or with its layers spread over CUDA `devices`; in float32 arithmetic.

    `native` selects the fast mode (weights in the file's own types) if the backend is CuPy, no `devices` are given, and that mode
    supports the model.

    Raises:
        InputError: no such backend or device, or too little memory there; ModelError: as `Transformer`.
    """
    graph = _graph(model, recorded)
    if devices:
        from .split import SplitTransformer

        return SplitTransformer(model, [choose(backend, number) for number in devices], resident=resident, recorded=graph)
    chosen = choose(backend)
    if native and chosen.name == "cupy" and graph is None:
        from .fast.transformer import FastTransformer
        from .fast.weights import lacking

        if lacking(model) is None:
            return FastTransformer(model, chosen)
    return Transformer(model, chosen, resident=resident, recorded=graph)


def _graph(model: GgufModel, recorded: Recording | None) -> RecordedGraph | None:
    """llama.cpp's graph, if the steps are not written by hand and `recorded` can provide it."""
    return None if recorded is None or written_by_hand(model.hyperparameters, model.tensors) else recorded()
