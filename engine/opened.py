"""A model opened for computing: on the host, on a device, or over several."""

from collections.abc import Sequence

from .backend import choose
from .gguf_model import GgufModel
from .transformer import Transformer


def open_engine(model: GgufModel, backend: str = "auto", devices: Sequence[int] = (), *, resident: bool = True) -> Transformer:
    """Our engine in exact arithmetic: on the backend of that name, or with its layers spread over CUDA `devices`.

    Raises:
        InputError: no such backend or device, or too little memory there; ModelError: as `Transformer`.
    """
    if not devices:
        return Transformer(model, choose(backend), resident=resident)
    from .split import SplitTransformer

    return SplitTransformer(model, [choose(backend, number) for number in devices], resident=resident)
