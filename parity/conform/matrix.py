"""The cells of a run: profiles, lists and globs of architectures, weight types, prompts and modes."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import product

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.answers.conform import Cell
from checkpoints.errors import InputError
from engine.synth.recipes import dense, encoders, experts, names, recurrent, sparse

from ..run import command
from ..run.request import Prompt

PREFILL, DECODE, CHUNKED, BATCH, STATE = "prefill", "decode", "chunked", "batch", "state"
MODES = (PREFILL, DECODE, CHUNKED, BATCH, STATE)
# What a side must support for a mode: the placeholder of its command line.
NEEDS = {DECODE: command.PORTIONS, CHUNKED: command.PORTIONS, BATCH: command.SEQUENCES, STATE: command.STATE}
# Column -> the file type with which llama.cpp makes it. Types that need an importance matrix are left out.
TYPES = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1",
    "Q2_K": "Q2_K", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "Q6_K": "Q6_K", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
}  # fmt: skip
# Token ids: seeded, without special meaning. `long` exceeds the attention windows of the tiny models and spans several chunks.
PROMPTS = {
    "short": (17, 403, 1290, 88, 745, 1902),
    "long": tuple((401 * i + 37) % 1999 + 3 for i in range(37)),
    "one": (403,),
    "same": (745,) * 9,
}
_DECODED = 3  # tokens that DECODE computes one by one at the end, and STATE after restoring its state
_LISTED = 20  # names that an error lists
_CHUNK = 4  # tokens in each pass of CHUNKED


class Profile(Struct, frozen=True):
    """A named part of the matrix."""

    architectures: tuple[str, ...]
    types: tuple[str, ...]
    prompts: tuple[str, ...] = ("short", "long")


def _family(*families: Iterable[object]) -> tuple[str, ...]:
    return tuple(str(entry.name) for family in families for entry in family)  # type: ignore[attr-defined]


_DENSE = ("llama", "qwen2", *_family(dense.RECIPES))
PROFILES = {
    "llama": Profile(("llama",), ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"), tuple(PROMPTS)),
    "quants": Profile(("llama",), tuple(TYPES)),
    "dense": Profile(_DENSE, ("F32", "F16", "Q8_0", "Q4_K")),
    "moe": Profile(_family(experts.RECIPES, sparse.RECIPES), ("F32", "F16", "Q8_0", "Q4_K")),
    "recurrent": Profile(_family(recurrent.RECIPES), ("F32", "F16", "Q8_0")),
    "all": Profile(
        (*_DENSE, *_family(experts.RECIPES, sparse.RECIPES, recurrent.RECIPES, encoders.RECIPES)),
        ("F32", "F16", "Q8_0", "Q4_K"),
    ),
}


def cells(
    profile: str,
    architectures: str | None = None,
    types: str | None = None,
    prompts: str | None = None,
    modes: str | None = None,
    possible_modes: Sequence[str] = MODES,
) -> list[Cell]:
    """The cells of a profile; names and globs (with commas) replace its values along an axis.

    Args:
        possible_modes: those that the side supports.

    Raises:
        InputError: an unknown profile or name, or a mode that the side does not support.
    """
    if profile not in PROFILES:
        raise InputError(f"--profile {profile!r} is unknown.", f"Use one of {', '.join(PROFILES)}.", code="profile")
    chosen = PROFILES[profile]
    wanted_modes = list(possible_modes) if modes is None else _picked(modes, MODES, "--modes")
    if impossible := [mode for mode in wanted_modes if mode not in possible_modes]:
        needed = NEEDS[impossible[0]]
        raise InputError(
            f"--modes {impossible[0]} needs an engine that takes {_NEEDED_OPTION[needed][0]}.",
            f"This side has the modes {', '.join(possible_modes)}. For an engine that writes dumps, put {needed} into --exec: "
            f"{_NEEDED_OPTION[needed][1]}.",
            code="modes",
        )
    axes = (
        chosen.architectures if architectures is None else _picked(architectures, names(), "--architectures"),
        chosen.types if types is None else _picked(types, tuple(TYPES), "--types"),
        chosen.prompts if prompts is None else _picked(prompts, tuple(PROMPTS), "--prompts"),
        wanted_modes,
    )
    return [cell for cell in (Cell(*place) for place in product(*axes)) if prompt_of(cell) is not None]


_NEEDED_OPTION = {
    command.PORTIONS: ("how to split the prompt", "the number of tokens in each forward pass, separated by commas"),
    command.SEQUENCES: ("several prompts at once", "ids with commas, prompts with semicolons, in the place of {tokens}"),
    command.STATE: ("the file of its state", "a file: continue from it if it exists, and write the state into it at the end"),
}


def prompt_of(cell: Cell) -> Prompt | None:
    """The cell's prompt and how it is computed; None if the mode would be the same as a prefill."""
    ids = PROMPTS[cell.prompt]
    prompt, count = Prompt(None, ids, ()), len(ids)
    if cell.mode == PREFILL:
        return prompt
    if cell.mode == BATCH:  # the other prompts of PROMPTS, shorter and longer ones
        return replace(prompt, companions=tuple(other for name, other in PROMPTS.items() if name != cell.prompt))
    if cell.mode == CHUNKED:
        rest = [count % _CHUNK] if count % _CHUNK else []
        return replace(prompt, portions=(*[_CHUNK] * (count // _CHUNK), *rest)) if count > _CHUNK else None
    if count <= _DECODED:
        return None
    if cell.mode == STATE:
        return replace(prompt, saved=count - _DECODED)
    return replace(prompt, portions=(count - _DECODED, *[1] * _DECODED))


def modes_of(ways: Collection[str]) -> tuple[str, ...]:
    """The modes that a side supports, given the placeholders `ways` that it takes."""
    return tuple(mode for mode in MODES if mode not in NEEDS or NEEDS[mode] in ways)


def _picked(text: str, known: Sequence[str], option: str) -> list[str]:
    picked: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        matching = [name for name in known if fnmatchcase(name.lower(), part.lower())]
        if not matching:
            close = get_close_matches(part.lower(), known, n=3)
            advice = f"Did you mean {' or '.join(close)}?" if close else _known(known)
            raise InputError(f"{option} {part!r} is unknown.", advice, code="matrix")
        picked += [name for name in matching if name not in picked]
    if not picked:
        raise InputError(f"{option} is empty.", _known(known), code="matrix")
    return picked


def _known(names: Sequence[str]) -> str:
    if len(names) > _LISTED:
        return "`parity synth --architecture list` names all."
    return f"Known: {', '.join(names)}."
