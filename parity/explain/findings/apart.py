"""Finds what would distinguish faults that give the same numbers here: other points, another prompt, another model."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from engine.backend import Array
from engine.faults import SEEN, Planting
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay
from engine.synth import Shape, synthesize
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from reports.numbers import count

from ...diff.limits import EXACT_FLOOR
from ..budget import Budget
from ..case import Case
from ..search.state import Candidate, SearchState, rows_enough

_LONGER = 80  # tokens of a longer prompt: beyond the blocks of 32 and 64 in which engines cut prompts
_LONGEST = 512  # its most tokens, whatever the dump's own length: scores grow with its square
_SHORT = 12  # tokens of a generation …
_GENERATED = 4  # … the last ones of them passes of one token each
_SEED = 6  # of the tokens and weights of the probes
_NAMES = 4  # points and faults that a sentence lists
_QUANTISED = "q4_1"
# Small models of the kinds in which the catalogue's faults differ: groups of query heads, biases, pairs, frequency factors.
# Three layers: with two, a buffer that is swapped in each layer cannot hold another layer's output.
_MODELS = {
    "a qwen2 model with 3 layers, 7 query heads a key head and biases": (Shape("qwen2", 3, 112, 14, 2, 0, 96, 200), "f16"),
    "a llama model with frequency factors and linear scaling": (
        Shape("llama", 2, 96, 4, 2, 32, 160, 200, biases=False, eps=1e-5, rope_base=1e4, rope_factors=True, rope_scaling=4.0),
        "f16",
    ),
    "a model quantised to Q4_1": (Shape("qwen2", 2, 128, 4, 2, 0, 96, 200), _QUANTISED),
}

Values = Mapping[str, Array]


class Probe(Struct, frozen=True):
    """A run in which faults are compared: the right engine's replay and steps, up to step number `end`."""

    sentence: str
    replay: Replay
    planting: Planting
    end: int
    own: bool = True  # whether it is the user's model, so that a layer means that layer
    scout: "Probe | None" = None  # a cheaper probe: faults that it does not distinguish are not tried

    def shown_by(self, candidate: Candidate) -> Values | None:
        """The values that a dump of every point would show of a fault, if they differ from the right run; None if it does not apply."""
        try:
            steps = self.planting.of(candidate.fault, candidate.layers if self.own else None, candidate.parameters)
            if candidate.fault.shows is None:
                name = self.planting.steps[self.end - 1].makes
                steps = steps[: [step.makes for step in steps].index(name) + 1]
            changed = self.replay.run(steps, lambda _name, _value: True)
        except NotApplicable:
            return None
        return {
            name.removeprefix(SEEN): values for name, values in changed.items()
        }  # values that only the dump shows come last

    def tells(self, chosen: Candidate, others: Sequence[Candidate]) -> list[tuple[Candidate, list[str]]]:
        """The other candidates that show different numbers than the chosen one, and at which points."""
        expected = self.shown_by(chosen) if others else None
        differences = [(candidate, self.different(expected, self.shown_by(candidate))) for candidate in others]
        return [(candidate, names) for candidate, names in differences if names]

    def likely(self, chosen: Candidate, others: Sequence[Candidate]) -> list[Candidate]:
        """The other candidates that do not show the chosen one's numbers: they show different ones, or do not apply to this model."""
        expected = self.shown_by(chosen) if others else None
        values_of = [(candidate, self.shown_by(candidate)) for candidate in others]
        return [
            candidate
            for candidate, values in values_of
            if expected is None or values is None or self.different(expected, values)
        ]

    def different(self, first: Values | None, second: Values | None) -> list[str]:
        """The points at which two faults show different numbers."""
        if first is None or second is None:
            return []
        names = [step.makes for step in self.planting.steps[: self.end] if step.makes in first or step.makes in second]
        right = self.replay.values
        return [name for name in names if _differ(first.get(name, right[name]), second.get(name, right[name]))]


def _differ(first: Array, second: Array) -> bool:
    if first.shape != second.shape:  # heads of another size, say
        return True
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        wide = first.astype(np.float64)
        error = ((wide - second) ** 2).sum() / (wide**2).sum()
    return not bool(error <= EXACT_FLOOR.operations)


def apart(case: Case, state: SearchState, chosen: Candidate, others: Sequence[Candidate], budget: Budget) -> str:
    """A sentence on what distinguishes the faults of one class, from probes that were run; "" if there are no others.

    Args:
        state: the state to which the fault was added.
        budget: when it is used up no more probes are tried.
    """
    if not others or state.first is None:
        return ""
    left, sentences, tried = list(others), [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, probe in enumerate(_probes(case, state, [chosen, *others], Path(folder))):
            if budget.late:
                break
            likely = left if probe.scout is None else probe.scout.likely(chosen, left)
            tried.append(probe.sentence if likely or probe.scout is None else f"{probe.sentence} in a small model")
            telling = probe.tells(chosen, likely)
            if telling:
                points = sorted({names[0] for _, names in telling})
                where = f"{probe.sentence} ({_listed(points)})" if number == 0 else probe.sentence
                sentences.append(
                    f"{where} would tell {_listed([_named_apart(candidate, chosen) for candidate, _ in telling])} apart"
                )
            separated = [candidate for candidate, _ in telling]
            left = [candidate for candidate in left if candidate not in separated]
            if not left:
                break
    if left and tried:
        same = list(dict.fromkeys(_named_apart(candidate, chosen) for candidate in left))
        runs = f"{tried[0]} and {count(len(tried) - 1, 'other run')}" if len(tried) > 1 else tried[0]
        sentences.append(
            f"{_listed(same)} {'gives' if len(same) == 1 else 'give'} the same numbers in all that was tried ({runs})"
        )
    return "; ".join(sentences)


def _named_apart(candidate: Candidate, chosen: Candidate) -> str:
    """A fault with its parameters, and with its place only if the chosen one is the same fault elsewhere."""
    given = candidate.parameters.items()
    plain = [str(value) for _, value in given if not isinstance(value, tuple)]
    tuples = [value for name, value in given if isinstance(value, tuple) and value != chosen.parameters.get(name)]
    places = [candidate.fault.says.get(value) or " and ".join(map(str, value)) for value in tuples]
    values = ", ".join([*plain, *(places if candidate.fault is chosen.fault else [])])
    return f"{candidate.fault.name} ({values})" if values else candidate.fault.name


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:_NAMES]) + (f" and {len(unique) - _NAMES} more" if len(unique) > _NAMES else "")


def _probes(case: Case, state: SearchState, candidates: Sequence[Candidate], folder: Path) -> Iterator[Probe]:
    """Probes, the cheap ones first: this prompt, a short generation, small models, a long prompt; the user's model is run up to the place
    that differs.
    """
    if state.first is None:
        return
    end = state.order[case.entries[state.first.point].point] + 1
    planting = Planting(state.steps, [step.makes for step in state.steps[:end]])
    rows = rows_enough(state.steps, state.first.row + 2, len(case.positions))
    yield Probe("other points of this prompt", case.make(state.steps, rows, case.replay), planting, end)
    length = min(max(_LONGER, min(2 * len(case.tokens), _LONGEST)), case.transformer.hp.n_ctx_train)
    tokens = np.random.default_rng(_SEED).integers(0, case.transformer.hp.n_vocab, length).tolist()
    short = tokens[: min(len(tokens), _SHORT)]
    generation = _replay(case.transformer, state.steps, short, _GENERATED, case.given)
    yield Probe(f"a generation of {_GENERATED} tokens", generation, planting, end)
    scout: Probe | None = None
    for number, (sentence, (shape, kind)) in enumerate(_MODELS.items()):
        if kind == _QUANTISED and not any(candidate.fault.group == "dequantisation" for candidate in candidates):
            continue
        path = folder / f"{number}.gguf"
        synthesize(path, shape, weight_type=kind, seed=_SEED)
        small = Transformer(GgufModel(path), case.transformer.backend)
        known = [token % shape.vocab for token in tokens]
        probes = [
            Probe(sentence, _replay(small, small.steps, some, generated), Planting(small.steps), len(small.steps), own=False)
            for some, generated in ((known[: len(short)], _GENERATED), (known, 0))
        ]
        yield probes[0]
        scout = scout or probes[1]
    yield Probe(
        f"a prompt of {length} tokens",
        _replay(case.transformer, state.steps, tokens, 0, case.given),
        planting,
        end,
        scout=scout,
    )


def _replay(
    transformer: Transformer, steps: Sequence[Step], tokens: Sequence[int], generated: int, given: Values | None = None
) -> Replay:
    """A run of a prompt whose last `generated` tokens are passes of their own; `given` are further values that the steps read."""
    prompt = len(tokens) - generated
    passes = [max(0, row - prompt + 1) for row in range(len(tokens))]
    return Replay(
        steps,
        tokens,
        range(len(tokens)),
        passes,
        transformer.weights,
        transformer.backend,
        given={} if given is None else given,
        sure=transformer.steps,
    )
