"""One file per architecture, named after it: `steps(blocks)` returns its list of steps."""

import pkgutil
from importlib import import_module

from checkpoints.errors import ModelError

from ..blocks import Blocks
from ..graph import Step
from ..weights.gguf_model import Hyperparameters


def architectures() -> list[str]:
    """The architectures that our engine has."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def written_by_hand(hyperparameters: Hyperparameters) -> bool:
    """Whether there is a list of steps for this model here; every other model's is lifted from llama.cpp's graph."""
    return hyperparameters.architecture in architectures() and not hyperparameters.irregular


def steps_of(architecture: str, blocks: Blocks) -> list[Step]:
    """The list of steps of a model.

    Raises:
        ModelError: an architecture that our engine does not have; the message lists those it has.
    """
    if architecture not in architectures():
        raise ModelError(
            f"our engine has no architecture {architecture!r}; it has {', '.join(architectures())}.",
            "`parity dump ref` and `parity diff` take any architecture that llama.cpp runs.",
            code="architecture",
        )
    if blocks.hp.irregular:
        raise ModelError(
            f"the list of steps of {architecture} does not fit this model: {blocks.hp.irregular}.",
            "The metadata may be damaged; a sound model is computed from llama.cpp's graph.",
            code="irregular",
        )
    found: list[Step] = import_module(f".{architecture}", __package__).steps(blocks)
    return found
