"""Does the direction of a fault's effect show it where a lower arithmetic's noise hides its size?

    PYTHONPATH=tests:benchmarks python benchmarks/matched.py [--from 0] [--seconds S] [--out FILE.jsonl]

Engines of seeded small models compute in F16, BF16, TF32 or 8 bits, most of them in ways that are not ours: half of the kinds of result
stored in the lower type, digits cut off, sums in F16, one scale a row. One of three is right, two have an entry of the catalogue planted
in all layers; those that pass in the stated arithmetic count. For each, one line: of the planted entry and of the others that remove most
of the error, what `parity.explain.rounding.directions` measures. Printed is, of right engines, what an entry removes at most and, of
faulty ones, how many have the planted entry in them by the rule of `parity.explain.rounding.hidden`, and how many another.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
from kind import Arithmetic
from kinds_of_engine import CUTTING, HALF_SUMS, multiplies
from msgspec import Struct
from msgspec.structs import asdict, replace
from numpy.typing import NDArray
from planted import Faulty
from right_engines import Model, computed, model_of
from written import Written

from checkpoints.errors import ParityError
from checkpoints.points import parse
from checkpoints.record import Dump
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE, Planting, as_recorded, plant
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.replay.precision import ROUNDINGS, rounded
from parity.explain.case import Case, ExplainOptions, Half
from parity.explain.rounding.directions import Along, Directions, noise_of, plain_rows
from parity.explain.rounding.hidden import is_hidden
from parity.explain.rounding.looks_like import floor_of
from parity.explain.rounding.precision import UPPER, with_noise
from reference.client import Reference

_KINDS = ("f16", "bf16", "tf32", "q8")
_FAULTY = 2  # faulty engines of each arithmetic and model, besides a right one
_SHARES = (0.05, 20.0)  # of the noise: the effects that are planted
_EXACT = 1e-10


class Entry(Struct, frozen=True):
    """An entry planted in all layers, and the values that it changes."""

    name: str
    parameters: dict[str, Any]
    steps: list[Step]
    values: Mapping[str, NDArray[np.float32]]

    @property
    def numbered(self) -> bool:
        """Whether it has a number of its own, which may make its effect of any size."""
        return any(isinstance(value, float) for value in self.parameters.values())


def entries_of(case: Case) -> list[Entry]:
    """Every variant of the catalogue that changes the model."""
    steps, found = case.transformer.steps, []
    for fault in CATALOGUE.values():
        for parameters in fault.variants(Planting(steps).right) if fault.shows is None and not fault.near_one else ():
            try:
                changed = as_recorded(plant(steps, fault, None, **parameters))
                values = case.replay.changed(changed)
            except (NotApplicable, KeyError, ValueError, IndexError):
                continue
            points = {name: np.asarray(value) for name, value in values.items() if name in case.replay.values}
            found.append(Entry(fault.name, dict(parameters), changed, points))
    return found


def some_stored(steps: Sequence[Step], kind: str, draw: random.Random) -> list[Step]:
    """Products rounded, and the results of half of the kinds of step stored in the lower type."""
    chosen = {one for one in sorted({parse(step.makes).kind for step in steps}) if draw.random() < 0.5}
    low = ROUNDINGS["bf16" if kind == "q8" else kind]

    def stored(own: Any) -> Any:
        def op(*inputs: Any, **params: Any) -> Any:
            value = own(*inputs, **params)
            return low(value) if value.dtype == np.float32 else value

        return op

    lower = rounded(steps, kind, storage=False)
    return [replace(step, op=stored(step.op)) if parse(step.makes).kind in chosen else step for step in lower]


def _by_rows(x: Array) -> Array:
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return (np.rint(x / scale) * scale).astype(np.float32)


def scale_by_rows(steps: Sequence[Step]) -> list[Step]:
    """8-bit activations with one scale a row."""

    def op(own: Any) -> Any:
        def rounding(*inputs: Any, **params: Any) -> Any:
            with patch.dict(ROUNDINGS, {"q8": _by_rows}):
                return own(*inputs, **params)

        return rounding

    return [replace(step, op=op(step.op)) for step in rounded(steps, "q8", storage=False)]


def ways_of(steps: Sequence[Step], draw: random.Random) -> dict[str, tuple[str, Arithmetic]]:
    """Arithmetics, each with what the engine states."""
    ways: dict[str, tuple[str, Arithmetic]] = {
        f"{kind}, half of the kinds stored": (kind, partial(some_stored, kind=kind, draw=draw)) for kind in _KINDS
    }
    for kind in ("f16", "bf16"):
        for number, way in enumerate(CUTTING[f"digits cut off to {kind}"].ways):
            ways[f"{kind}, digits cut off, {number}"] = kind, way
        ways[f"{kind} stored"] = kind, partial(rounded, kind=kind, storage=True)
    if all(step.op is ops.linear or not multiplies(step) for step in steps):
        ways["f16 sums"] = "f16", HALF_SUMS
    return ways | {"q8 by rows": ("q8", scale_by_rows), "q8": ("q8", partial(rounded, kind="q8", storage=False))}


def near_noise(case: Case, kind: str, entries: Sequence[Entry]) -> list[Entry]:
    """The entries whose effect has the size of an arithmetic's noise."""
    right = case.replay.on_host
    noise = case.make(rounded(case.transformer.steps, kind, storage=True), len(case.positions)).on_host
    near = []
    for entry in entries:
        shares = [
            float(((entry.values[point] - right[point]) ** 2).sum() / max(((noise[point] - right[point]) ** 2).sum(), 1e-30))
            for point in (one.point for one in case.entries)
            if point in entry.values and entry.values[point].shape == right[point].shape
        ]
        if shares and _SHARES[0] < max(shares) < _SHARES[1]:
            near.append(entry)
    return near


def measured(case: Case, kind: str, entries: Sequence[Entry]) -> list[tuple[Entry, Along]]:
    """What of the error lies along each entry's effect, what removes most first."""
    rows = plain_rows(case)
    directions = Directions(case, noise_of(case, kind, rows), rows)
    found = []
    for entry in entries:
        effect = directions.effect({name: value for name, value in entry.values.items() if name in directions.points})
        if effect is not None:
            found.append((entry, directions.along(effect)))
    return sorted(found, key=lambda pair: -pair[1].removed)


def passes(case: Case, kind: str) -> bool:
    """Whether no record is over what the arithmetic costs, and some are more than float32 makes."""
    entries = with_noise(floor_of(case, kind), case.entries, UPPER)
    return not any(entry.over.any() for entry in entries) and any((entry.base > _EXACT).any() for entry in entries)


def _dump(model: Model, way: Arithmetic, steps: Sequence[Step]) -> Dump | None:
    faulty: Faulty = model.faulty
    right, faulty.right = faulty.right, list(steps)
    try:
        with np.errstate(all="ignore"):
            return computed(model, way)
    except (NotApplicable, ValueError, IndexError, ParityError):
        return None
    finally:
        faulty.right = faulty.transformer.steps = right


def engines(seed: int, folder: Path, reference: Reference) -> Iterator[dict[str, Any]]:
    """The engines of one seed's model that pass."""
    model = model_of(seed, folder, reference)
    transformer, draw = model.faulty.transformer, random.Random(seed)
    if transformer.encoder is not None:
        return
    right, layers = list(model.faulty.right), transformer.model.info.layers or 1
    options = ExplainOptions(tokens=model.tokens)
    first = Case(Written(16, "default", True, True).of(model.ref, layers, "f32"), Half(transformer), options)
    entries = entries_of(first)
    near = {kind: near_noise(first, kind, entries) for kind in _KINDS}
    for name, (kind, way) in ways_of(right, draw).items():
        drawn = [draw.choice(near[kind]) for _ in range(_FAULTY if near[kind] else 0)]
        for planted in (None, *drawn):
            whole = _dump(model, way, right if planted is None else planted.steps)
            written = Written(draw.choice([10, 16, None]), draw.choice(["default", "all"]), draw.random() < 0.5, True)
            if whole is None or not passes(case := Case(written.of(whole, layers, kind), Half(transformer), options), kind):
                continue
            rows = [
                {"planted": entry is planted, "name": entry.name, "numbered": entry.numbered}
                | {"parameters": str(entry.parameters), "hidden": is_hidden(along) and not entry.numbered}
                | asdict(along)
                for entry, along in measured(case, kind, entries)
            ]
            yield {
                "seed": seed,
                "model": model.name,
                "kind": name,
                "faulty": planted is not None,
                "written": vars(written),
                "rows": [row for number, row in enumerate(rows) if number < 10 or row["planted"]],
            }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The counts."""
    right = [line for line in lines if not line["faulty"]]
    faulty = [line for line in lines if line["faulty"] and any(row["planted"] and not row["numbered"] for row in line["rows"])]
    most = sorted(max((row["removed"] for row in line["rows"] if not row["numbered"]), default=0.0) for line in right)[-3:]
    own = sum(any(row["planted"] and row["hidden"] for row in line["rows"]) for line in faulty)
    other = sum(next((not row["planted"] for row in line["rows"] if row["hidden"]), False) for line in faulty)
    accused = sum(any(row["hidden"] for row in line["rows"]) for line in right)
    return (
        f"{len(right)} right engines: {accused} accused, the most that an entry removes {', '.join(f'{one:.3f}' for one in most)}\n"
        f"{len(faulty)} with an entry without a number of its own: {own} have it in them, {other} another first"
    )


def main() -> None:
    """Measure, one line an engine, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--out", type=Path, default=Path("matched.jsonl"))
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Reference() as reference:
        os.environ["PARITY_CACHE"] = folder
        seed = options.first
        while process_time() < options.seconds:
            try:
                lines += engines(seed, Path(folder), reference)
            except ParityError as error:
                print(seed, error, flush=True)
            options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
            seed += 1
    print(table(lines))


if __name__ == "__main__":
    main()
