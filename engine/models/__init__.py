"""One file per architecture, named after it: `steps(blocks)` returns its list of steps."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module

from checkpoints.errors import ModelError

from ..blocks import Blocks, HasShape
from ..graph import RowsOf, Step
from ..weights.gguf_model import Hyperparameters


def architectures() -> list[str]:
    """The architectures whose steps are written by hand."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def written_by_hand(hyperparameters: Hyperparameters, tensors: Mapping[str, HasShape]) -> bool:
    """Whether this model's list of steps is written here; every other model's is lifted from llama.cpp's graph.

    A list fits only a file with exactly the weights that it reads: one with a fused projection or a further norm is lifted.
    """
    if hyperparameters.architecture not in architectures() or hyperparameters.irregular:
        return False
    try:
        steps = steps_of(hyperparameters.architecture, Blocks(hyperparameters, tensors))
    except ModelError:
        return False
    read = {weight.weight if isinstance(weight, RowsOf) else weight for step in steps for weight in step.weights}
    return tensors.keys() <= read


def steps_of(architecture: str, blocks: Blocks) -> list[Step]:
    """The list of steps of a model.

    Raises:
        ModelError: an architecture without such a list; the message says which have one.
    """
    if architecture not in architectures():
        raise ModelError(
            f"the steps of {architecture!r} are not written by hand ({', '.join(architectures())} are).",
            "They must be read from llama.cpp's graph, which was not recorded here.",
            code="architecture",
        )
    if blocks.hp.irregular:
        raise ModelError(
            f"the list of steps of {architecture} does not fit this model: {blocks.hp.irregular}.",
            "The metadata may be damaged; a sound model is computed from llama.cpp's graph.",
            code="irregular",
        )
    steps: list[Step] = import_module(f".{architecture}", __package__).steps(blocks)
    return steps
