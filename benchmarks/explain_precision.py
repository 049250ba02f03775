"""Precision alone, and faults under it: whom does `parity explain` accuse, and what are its limits' distances.

Run as `PYTHONPATH=tests python benchmarks/explain_precision.py [right|floors|faulty] [--seeds 100] [--from 0]`.
Models of random shape, weights and type, random prompts; the search sees seven points of sixteen values.

`right`: engines without a fault in eight arithmetics; prints how many are told "no fault".
`floors`: how far their errors lie from the floors that `parity.explain.rounding.precision` measures: what UPPER, LOWER and SINGLE there
come from.
`faulty`: engines in F16 and BF16 arithmetic with one small fault; prints how often it is named, with and without `--compute`.
"""

import argparse
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from planted import Faulty, Planted, half_sums, tokens_of

from checkpoints.answers.explain import Explanation
from checkpoints.record import Dump
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.inapplicable import NotApplicable
from engine.replay.precision import rounded
from engine.synth import Shape, synthesize
from parity.explain.case import Case
from parity.explain.explain import ExplainOptions, explain
from parity.explain.rounding.precision import floor, ratios

Arithmetic = Callable[[Sequence[Step]], Sequence[Step]]


def other_order(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A product in float32 that is summed in another order than BLAS does."""
    product = np.einsum("ti,oi->to", x[:, ::-1], weight.reshape(-1, x.shape[1])[:, ::-1], optimize=False)
    return product if bias is None else product + bias


def _with(steps: Sequence[Step], op: Callable[..., Array]) -> list[Step]:
    return [replace(step, op=op) if step.op is ops.linear else step for step in steps]


# Each arithmetic, and the kind of floor that it is held to ("" for float32).
ARITHMETIC: dict[str, tuple[str, Arithmetic]] = {
    "f32, other order": ("", lambda steps: _with(steps, other_order)),
    "f16 products": ("f16", lambda steps: rounded(steps, "f16", storage=False)),
    "f16 stored": ("f16", lambda steps: rounded(steps, "f16", storage=True)),
    "f16 sums": ("f16", lambda steps: _with(steps, half_sums)),
    "bf16 products": ("bf16", lambda steps: rounded(steps, "bf16", storage=False)),
    "bf16 stored": ("bf16", lambda steps: rounded(steps, "bf16", storage=True)),
    "tf32 products": ("tf32", lambda steps: rounded(steps, "tf32", storage=False)),
    "q8 activations": ("q8", lambda steps: rounded(steps, "q8", storage=False)),
}
# Faults whose effect is of the size of rounding, and some that are not, by the right model's values.
SMALL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("norm-epsilon", {"eps": 1e-5}),
    ("norm-epsilon", {"eps": 1e-6}),
    ("eps-outside-root", {}),
    ("rope-base", {"base": 10000.0}),
    ("rope-base", {"base": 5e5}),
    ("rope-base", {"base": 1e6}),
    ("rope-position", {}),
    ("activation", {"activation": "GELU (tanh)"}),
    ("no-qkv-bias", {"at": ("k",)}),
    ("gqa-modulo", {}),
)


def random_model(folder: Path, seed: int) -> tuple[Faulty, tuple[int, ...]]:
    """A model of random shape, weights and type, and a random prompt."""
    rng = random.Random(seed)
    architecture = rng.choice(["qwen2", "llama"])
    kv_heads, group = rng.choice([1, 2]), rng.choice([1, 2, 4, 7])
    head = rng.choice([8, 16, 32])
    shape = Shape(
        architecture,
        rng.choice([2, 4, 8, 12]),
        kv_heads * group * head,
        kv_heads * group,
        kv_heads,
        0,
        rng.choice([64, 128, 256]),
        512,
        biases=architecture == "qwen2",
        eps=rng.choice([1e-5, 1e-6]),
        rope_base=rng.choice([1e4, 5e5, 1e6]),
    )
    model = folder / "random.gguf"
    synthesize(model, shape, weight_type=rng.choice(["f32", "f16", "bf16"]), seed=seed)
    return Faulty(model), tokens_of(model, rng.randrange(4, 24), seed)


def dump_of(faulty: Faulty, steps: Sequence[Step], tokens: tuple[int, ...]) -> Dump:
    """The dump of an engine that runs these steps."""
    return faulty.dump(Planted(()), tokens, steps=steps)


def right_engines(folder: Path, seeds: range) -> None:
    """Print what right engines in each arithmetic are told."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in seeds:
        faulty, tokens = random_model(folder, seed)
        for name, (_, arithmetic) in ARITHMETIC.items():
            answer = explain(dump_of(faulty, arithmetic(faulty.right), tokens), faulty.model, ExplainOptions())
            answers[name]["no fault" if answer else "accused" if answer.causes else "differs, no cause"] += 1
            if not answer:
                print(f"seed {seed}, {name}: {answer.first}, {[cause.named.fault for cause in answer.causes]}", flush=True)
        print(f"seed {seed}: {sum(sum(counts.values()) for counts in answers.values())} runs", flush=True)
    for name, counts in answers.items():
        print(f"{name:<17} {dict(counts)}")


def floors(folder: Path, seeds: range) -> None:
    """Print the distribution of right engines' distances from the floors."""
    distances: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in seeds:
        faulty, tokens = random_model(folder, seed)
        for name, (kind, arithmetic) in ARITHMETIC.items():
            if kind:
                case = Case(dump_of(faulty, arithmetic(faulty.right), tokens), faulty.model, ExplainOptions())
                measured = floor(kind, case.entries, case.transformer.steps, case.replay, case.make, case.positions)
                distances[name] += ratios(measured, case.entries)
    print("ratio to the floor, over points: smallest, 1 %, median, 99 %, largest")
    for name, rows in distances.items():
        lower, upper, single = np.array(rows).T
        for what, values in (("mean / products", lower), ("mean / storage", upper), ("largest record / storage", single)):
            spread = "  ".join(f"{value:9.3g}" for value in np.nanpercentile(values, [0, 1, 50, 99, 100]))
            print(f"{name:<17} {what:<24} {spread}")


def _small(faulty: Faulty) -> Iterator[tuple[str, dict[str, Any], list[Step]]]:
    """The small faults that change this model."""
    for name, parameters in SMALL:
        try:
            yield name, parameters, plant(faulty.right, CATALOGUE[name], **parameters)
        except NotApplicable:
            continue


def judge(answer: Explanation, name: str) -> str:
    """Named; named with something left; precision: only precision; located: a place without a name; wrong: another name."""
    if answer.precision_only or answer.first is None:
        return "precision"
    classes = [{cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in answer.causes]
    if any(name not in names for names in classes):
        return "wrong"
    return "located" if not classes else "named" if answer.remaining is None else "named, rest left"


def faulty_engines(folder: Path, seeds: range) -> None:
    """Print what engines in lower arithmetic with one small fault are told."""
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for seed in seeds:
        faulty, tokens = random_model(folder, seed)
        parts = list(_small(faulty))
        name, parameters, steps = parts[seed % len(parts)]
        for arithmetic in ("f16 products", "f16 stored", "bf16 products", "bf16 stored"):
            kind, change = ARITHMETIC[arithmetic]
            dump = dump_of(faulty, change(steps), tokens)
            for compute in (None, kind):
                answer = explain(dump, faulty.model, ExplainOptions(compute=compute))
                outcome = judge(answer, name)
                answers[arithmetic, compute or "unknown"][outcome] += 1
                if outcome == "wrong":
                    causes = [(cause.named.fault, cause.named.parameters, cause.named.layers) for cause in answer.causes]
                    print(f"seed {seed}, {arithmetic}, compute {compute}, {name} {parameters}: {causes}", flush=True)
    for (arithmetic, compute), counts in answers.items():
        print(f"{arithmetic:<14} compute {compute:<8} {dict(counts)}")


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", default="right", choices=["right", "floors", "faulty"])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--from", dest="first", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure = {"right": right_engines, "floors": floors, "faulty": faulty_engines}
        measure[options.what](Path(folder), range(options.first, options.first + options.seeds))


if __name__ == "__main__":
    main()
