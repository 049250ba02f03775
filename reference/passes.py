"""The passes of a run and what each of them computes: an encoder's, the prompt's, and those over one token."""

from collections.abc import Collection, Sequence
from functools import cached_property

from msgspec import Struct

from checkpoints.points import ENCODER

from .naming import Planned
from .rows import Survey, survey
from .session import Session


class Plans(Struct, frozen=True, dict=True):
    """Surveys of a run's passes; `single` is that of a single token, which llama.cpp may build differently (None: not listed)."""

    prompt: Survey
    single: Survey | None
    encoder: Survey | None = None

    @cached_property
    def names(self) -> list[str]:
        """Every point of the run in the order of computation, the encoder's first."""
        encoder = [] if self.encoder is None else [item.point for item in self.encoder.known]
        return [*encoder, *(item.point for item in self.prompt.known)]

    def wanted(self, names: Collection[str], *, count: int = 0, encoder: bool = False) -> list[Planned]:
        """The values of those names in a pass over `count` tokens, or in the encoder's pass.

        Raises:
            ValueError: the pass is over one token, and its graph was not listed.
        """
        if count == 1 and not encoder and self.single is None:
            raise ValueError("the graph of a pass over one token was not listed")
        chosen = set(names)
        plan = self.encoder if encoder else (self.single if count == 1 else self.prompt)
        return [item for item in (() if plan is None else plan.known) if item.point in chosen]


def plans_of(session: Session, prompt: Sequence[int], encoded: Sequence[int] = (), *, single: bool = True) -> Plans:
    """List the graphs of a run; nothing stays in the session's cache.

    Args:
        prompt: the tokens of the (decoder's) first pass.
        encoded: the tokens of the encoder, if there is one.
        single: whether some pass may take a single token; listing its graph takes as long as listing the prompt's.
    """
    encoder = None
    if encoded:
        encoder = survey(session, encoded, prefix=ENCODER, encode=True)
        session.decode(encoded, 0, encode=True)  # without it a decoder's graph cannot be built
    whole = survey(session, prompt)
    if len(prompt) == 1:
        return Plans(whole, whole, encoder)
    return Plans(whole, survey(session, prompt[:1]) if single else None, encoder)
