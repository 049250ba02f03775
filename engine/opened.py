"""A model opened for computing: on the host, on a device, or over several."""

from collections.abc import Callable, Sequence

from checkpoints.graph import RecordedGraph

from .backend import choose
from .models import written_by_hand
from .transformer import Transformer
from .weights.gguf_model import GgufModel


def open_engine(
    model: GgufModel,
    backend: str = "auto",
    devices: Sequence[int] = (),
    *,
    resident: bool = True,
    native: bool = False,
    recorded: Callable[[], RecordedGraph] | None = None,
) -> Transformer:
    """Our engine on the backend of that name, or with its layers spread over CUDA `devices`; in float32 arithmetic.

    `recorded` gives llama.cpp's graph of the model; it is called only where the steps are not written by hand. `native`
    takes the fast mode instead (weights in the file's own types) with CuPy and no `devices`, where that mode has the model.

    Raises:
        InputError: no such backend or device, or too little memory there; ModelError: as `Transformer`.
    """
    written = recorded is None or written_by_hand(model.hyperparameters)
    graph = None if written or recorded is None else recorded()
    if not devices:
        chosen = choose(backend)
        if native and chosen.name == "cupy":
            from .fast.transformer import FastTransformer
            from .fast.weights import lacking

            if graph is None and lacking(model) is None:
                return FastTransformer(model, chosen)
        return Transformer(model, chosen, resident=resident, recorded=graph)
    from .split import SplitTransformer

    return SplitTransformer(model, [choose(backend, number) for number in devices], resident=resident, recorded=graph)
