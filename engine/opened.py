"""A model opened for computing: on the host, on a device, or over several."""

from collections.abc import Sequence

from .backend import choose
from .transformer import Transformer
from .weights.gguf_model import GgufModel


def open_engine(
    model: GgufModel, backend: str = "auto", devices: Sequence[int] = (), *, resident: bool = True, native: bool = False
) -> Transformer:
    """Our engine on the backend of that name, or with its layers spread over CUDA `devices`; in float32 arithmetic.

    `native` takes the fast mode instead (weights in the file's own types) with CuPy and no `devices`, where that mode has the model.

    Raises:
        InputError: no such backend or device, or too little memory there; ModelError: as `Transformer`.
    """
    if not devices:
        chosen = choose(backend)
        if native and chosen.name == "cupy":
            from .fast.transformer import FastTransformer
            from .fast.weights import lacking

            if lacking(model) is None:
                return FastTransformer(model, chosen)
        return Transformer(model, chosen, resident=resident)
    from .split import SplitTransformer

    return SplitTransformer(model, [choose(backend, number) for number in devices], resident=resident)
