"""One model's own runs, made once for all dumps that are judged of it: a sweep's time goes to judging, not to computing the same again.

Our engine, its values in each arithmetic, and float64's depend on the model and the prompt alone. Commands compute them for each dump
anew, as they must; here they are computed when first asked for and then served from memory, to the bit.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engine.graph import Step
from engine.replay import precision
from engine.replay.disturbed import disturbed
from engine.replay.replay import Replay
from engine.replay.wide import values_of
from engine.transformer import Transformer
from parity.arbiter import arbiter
from parity.explain import case, explain, half_cases
from parity.explain import input as explained_input
from parity.explain.rounding import arithmetic
from parity.explain.rounding import precision as explained_precision

Key = tuple[Any, ...]


class KeptRuns:
    """What commands compute of one model, kept.

    Args:
        transformer: our engine of the model, whose steps are the right ones.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer
        self._changed: dict[Key, list[Step]] = {}  # the right steps in an arithmetic, or with rounding's noise
        self._replays: dict[Key, Replay] = {}
        self._values: dict[Key, dict[str, Any]] = {}
        self._own = {self._key(transformer.steps)}

    @staticmethod
    def _key(steps: Sequence[Step]) -> Key:
        return tuple(map(id, steps))

    def open_model(self, _model: Path, _options: Any) -> Transformer:
        """Our engine: a copy, whose steps a command may replace."""
        return copy(self._transformer)

    def rounded(self, steps: Sequence[Step], kind: str, *, storage: bool, normed: bool = False) -> list[Step]:
        """As `engine.replay.precision.rounded`."""
        made = precision.rounded(steps, kind, storage=storage, normed=normed)
        if self._key(steps) not in self._own:
            return made
        return self._kept(("rounded", kind, storage, normed, self._key(steps)), made)

    def disturbed(self, steps: Sequence[Step], seed: int) -> list[Step]:
        """As `engine.replay.disturbed.disturbed`."""
        if self._key(steps) not in self._own:
            return disturbed(steps, seed)
        return self._kept(("disturbed", seed, self._key(steps)), disturbed(steps, seed))

    def _kept(self, key: Key, steps: list[Step]) -> list[Step]:
        kept = self._changed.setdefault(key, steps)
        self._own.add(self._key(kept))
        return kept

    def replay(self, *args: Any) -> Replay:
        """As `Replay`: of the right steps and those made from them, one for each sequence of tokens."""
        steps, tokens, positions, passes, _, _, longer, given = args
        if longer is not None or given or self._key(steps) not in self._own:
            return Replay(*args)
        key = (self._key(steps), tuple(tokens), tuple(positions), tuple(passes))
        if key not in self._replays:
            self._replays[key] = Replay(*args)
        return self._replays[key]

    def values_of(
        self,
        variant: Any,
        steps: Sequence[Step],
        tokens: Sequence[int],
        positions: Sequence[int],
        passes: Sequence[int],
        weights: Any,
        backend: Any,
        wanted: Collection[str],
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """As `engine.replay.wide.values_of`: of the right steps all values are computed together."""
        run = (variant, steps, tokens, positions, passes, weights, backend)
        if given or self._key(steps) not in self._own:
            return values_of(*run, wanted, given)
        key = (variant, self._key(steps), tuple(tokens), tuple(positions), tuple(passes))
        kept = self._values.setdefault(key, {})
        if wanted - kept.keys():
            named = {step.makes for step in steps if not step.inner or step.makes in wanted}
            kept.update(values_of(*run, named | kept.keys(), given))
        return {name: kept[name] for name in wanted if name in kept}


@contextmanager
def kept_runs(transformer: Transformer) -> Iterator[None]:
    """Let `parity diff --model` and `parity explain` take one model's own runs from memory, for as long as this lasts."""
    kept = KeptRuns(transformer)
    places: tuple[tuple[Any, str, Any], ...] = (
        *((module, "open_model", kept.open_model) for module in (case, explain, explained_input)),
        (case, "Replay", kept.replay),
        (arithmetic, "rounded", kept.rounded),
        (explained_precision, "rounded", kept.rounded),
        (half_cases, "rounded", kept.rounded),
        (arbiter, "values_of", kept.values_of),
        (arbiter, "disturbed", kept.disturbed),
    )
    patches = [patch.object(module, name, function) for module, name, function in places]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
