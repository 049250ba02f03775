"""Two entries of the catalogue planted on one step compute something of the right shape, or say that they do not fit each other."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from planted import Faulty, tokens_of

from engine.backend import Array
from engine.faults import CATALOGUE, Fault, Planting
from engine.faults.base import kinds_of, layer_near
from engine.graph import Step
from engine.halves import decoder_alone, encoder_alone, handed_over
from engine.inapplicable import NotApplicable
from engine.replay.replay import Replay
from engine.synth.recipe import shape_of
from engine.synth.recipes import recipe
from parity.models.embedded import path as embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

# Sinks, caps, windows, frequency factors, experts, latent attention, scans, both at once, a delta rule, cross-attention, a norm after
# the sum, ALiBi.
ARCHITECTURES = (
    *("gpt-oss", "gemma2", "gemma3", "phi3-longrope", "mixtral", "deepseek2", "mamba2", "falcon-h1", "rwkv7", "qwen35"),
    *("t5", "bert", "bloom"),
)
ROWS, PASSES = 7, (0, 0, 0, 0, 0, 1, 2)  # a prompt of five tokens and two more: a number that is none of the models' sizes
Entry = tuple[Fault, Mapping[str, Any]]


def _structure(changed: Sequence[Step]) -> tuple[object, ...]:
    """What replaces a step, without the numbers: variants that differ in these alone fail, or fit, alike."""
    return tuple(
        (
            step.op if isinstance(step.op, FunctionType) else type(step.op),
            step.makes,
            len(step.reads),
            len(step.weights),
            *sorted(step.params),
        )
        for step in changed
    )


def _entries(planting: Planting) -> dict[int, list[Entry]]:
    """The entries that change a step, by its number: one variant of each structure, and of steps of one kind the first."""
    found: dict[int, dict[tuple[object, ...], Entry]] = defaultdict(dict)
    for fault in CATALOGUE.values():
        for chosen in fault.variants(planting.right) if fault.shows is None else ():
            try:
                edits = planting.edits(fault, None, chosen)
            except NotApplicable:
                continue
            for number, changed in edits.items():
                found[number].setdefault((fault.name, *_structure(changed)), (fault, chosen))
    first: dict[tuple[object, ...], int] = {}
    for number in sorted(found):
        step = planting.steps[number]
        first.setdefault((*kinds_of(step), step.op if isinstance(step.op, FunctionType) else type(step.op)), number)
    return {number: list(found[number].values()) for number in first.values()}


def _pairs(planting: Planting) -> Iterator[tuple[str, list[Step]]]:
    """The steps with two entries on one step, up to the last changed one, with a sentence that says which."""
    for number, entries in _entries(planting).items():
        layer = layer_near(planting.steps[number])
        layers = None if layer is None else (layer,)
        for below, of_below in entries:
            try:
                once = Planting(planting.of(below, layers, of_below))
            except NotApplicable:
                continue
            for fault, chosen in entries:
                try:
                    steps = once.of(fault, layers, chosen)
                except NotApplicable:
                    continue
                last = max((n for n, step in enumerate(steps) if planting.right.get(step.makes) is not step), default=0)
                yield f"{below.name} {of_below}, then {fault.name} {chosen}", steps[: last + 1]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_entries_on_one_step_fit_or_do_not_apply(architecture: str, reference: Reference, tmp_path: Path) -> None:
    """Every pair of entries that change one kind of step, one on the other, in runs that begin with right values."""
    made, model = recipe(architecture), tmp_path / "model.gguf"
    make_by_recipe(model, made, shape_of(made), {}, kind="f32", seed=3, tokenizer=embedded(), running=reference)
    engine = Faulty(model, reference.graph(model))
    transformer, tokens = engine.transformer, tokens_of(model, ROWS, 3)
    given: dict[str, Array] = {}

    def run(steps: Sequence[Step], longer: Replay | None = None) -> Replay:
        return Replay(steps, tokens, range(ROWS), PASSES, transformer.weights, transformer.backend, longer, given)

    planting = Planting(engine.right)
    if transformer.encoder is not None:
        planting = Planting(decoder_alone(transformer.encoder, engine.right))
        encoded = run(encoder_alone(transformer.encoder)).values
        given |= {name: encoded[plain] for name, plain in handed_over(transformer.encoder).items()}
    right = run(planting.steps)
    fitted = 0
    for sentence, steps in _pairs(planting):
        name = steps[-1].makes
        try:
            with np.errstate(all="ignore"):
                value = run(steps, right).values[name]
        except NotApplicable:
            continue
        fitted += 1
        assert name not in planting.right or value.shape == right.values[name].shape, sentence
    assert fitted > 100
