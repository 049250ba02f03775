"""Recipes: small models of many architectures, one entry each, as metadata. See `engine.synth.recipe` for what an entry says."""

from checkpoints.errors import InputError

from ..recipe import Recipe
from . import dense, encoders, experts, recurrent, sparse

RECIPES: dict[str, Recipe] = {
    entry.name: entry for family in (dense, experts, sparse, recurrent, encoders) for entry in family.RECIPES
}


OF_ANY_SHAPE = ("llama", "qwen2")  # made without a recipe (`engine.synth.dense`)


def names() -> list[str]:
    """Everything that `--architecture` takes: qwen2, llama and the recipes, sorted."""
    return sorted({*OF_ANY_SHAPE, *RECIPES})


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is no recipe of that name.
    """
    if name in OF_ANY_SHAPE:
        raise InputError(
            f"{name} has no recipe: a model of it is made from a shape.",
            "Use engine.synth.shape_like, or parity.synth.synthetic.make with a shape.",
            code="architecture",
        )
    if name not in RECIPES:
        raise InputError(
            f"there is no recipe for a model of architecture {name!r}.",
            f"Use one of {', '.join(names())}.",
            code="architecture",
        )
    return RECIPES[name]
