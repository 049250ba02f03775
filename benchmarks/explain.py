"""How many known faults `parity explain` names, on which models, from how little, and in what time.

Run as `python benchmarks/explain.py [table|logits|combined|precision|time] [--quick] [--models stories,llama,qwen2]`. Each fault is planted
into our engine with each of its variants, the engine writes a dump, and the search sees the dump alone.
"""

import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from checkpoints.explanation import Explanation
from engine import ops
from engine.backend import Array
from engine.faults import CATALOGUE
from engine.graph import Step
from engine.precision import rounded
from engine.synth import Shape, synthesize
from parity import default_model
from parity.explain import Options, explain
from parity.planted import Faulty, Planted, tokens_of

QWEN2 = Shape("qwen2", layers=24, width=112, heads=14, kv_heads=2, ff=256, vocab=1000)  # groups of 7, as Qwen2.5-0.5B
LLAMA = Shape("llama", 24, 96, 6, 3, 16, 224, 1000, biases=False, eps=1e-5, rope_base=5e5, rope_factors=True)


def models(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The models of the tables, by name."""
    made: dict[str, Callable[[], Path]] = {
        "stories": default_model.path,
        "llama": lambda: _synthetic(folder / "llama.gguf", LLAMA),
        "qwen2": lambda: _synthetic(folder / "qwen2.gguf", QWEN2),
    }
    for name in names:
        yield name, made[name]()


def _synthetic(path: Path, shape: Shape) -> Path:
    synthesize(path, shape, weight_type="f16", seed=7)
    return path


def named(explanation: Explanation, planted: Planted) -> bool:
    """Whether every planted fault is among the causes or their equivalents, and everything is explained."""
    if explanation.remaining is not None or not explanation.causes:
        return False
    classes = [{cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in explanation.causes]
    return all(any(name in found for found in classes) for name, _, _ in planted.faults)


def every_variant(faulty: Faulty, first_only: bool) -> Iterator[Planted]:
    """Every fault with its parameters that can act in this model."""
    right = {step.makes: step for step in faulty.right}
    for fault in CATALOGUE.values():
        variants = fault.variants(right)
        for parameters in variants[:1] if first_only else variants:
            yield Planted(((fault.name, parameters, None),))


def table(
    model: Path, *, first_only: bool = False, count: int = 24, points: str = "default", size: int = 16, generated: int = 0
) -> dict[str, dict[str, Any]]:
    """For each fault: variants seen, found, with no effect, and missed; seconds."""
    faulty = Faulty(model)
    tokens = tokens_of(model, count + generated, seed=1)
    result: dict[str, dict[str, Any]] = {}
    for planted in every_variant(faulty, first_only):
        name, parameters, _ = planted.faults[0]
        row = result.setdefault(name, {"found": 0, "no effect": 0, "impossible": 0, "missed": [], "seconds": 0.0})
        try:
            seen = faulty.dump(planted, tokens, points=points, size=size, generated=generated)
        except (ValueError, KeyError, IndexError, TypeError):
            row["impossible"] += 1
            continue
        began = perf_counter()
        answer = explain(seen, model, Options(tokens=tokens))
        row["seconds"] += perf_counter() - began
        if answer.first is None:
            row["no effect"] += 1
        elif named(answer, planted):
            row["found"] += 1
        else:
            row["missed"].append((parameters, [(cause.named.fault, cause.named.parameters) for cause in answer.causes]))
    return result


def print_table(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """One line a fault."""
    print(f"{name:<28} {'found':>5} {'missed':>6} {'no effect':>9} {'impossible':>10} {'s each':>6}")
    for fault, row in rows.items():
        tried = row["found"] + len(row["missed"]) + row["no effect"]
        each = row["seconds"] / max(tried, 1)
        print(
            f"{fault:<28} {row['found']:>5} {len(row['missed']):>6} {row['no effect']:>9} {row['impossible']:>10} {each:>6.2f}"
        )
        for parameters, causes in row["missed"]:
            print(f"    missed {parameters}: {causes}")


def combined(model: Path, number: int, seeds: range, budget: float) -> tuple[int, int, list[str]]:
    """Seeded random faults at once: combinations whose every fault is named, those tried, and a line on each other one."""
    faulty = Faulty(model)
    right = {step.makes: step for step in faulty.right}
    found, tried, others = 0, 0, []
    for seed in seeds:
        rng = random.Random(seed)
        chosen = rng.sample(sorted(CATALOGUE), number)
        parts = [(name, rng.choice(CATALOGUE[name].variants(right) or [{}]), None) for name in chosen]
        tokens = tokens_of(model, 24, seed)
        try:
            seen = faulty.dump(Planted(tuple(parts)), tokens)
        except (ValueError, KeyError, IndexError, TypeError):
            continue
        answer = explain(seen, model, Options(tokens=tokens, budget=budget))
        tried += 1
        if answer.first is None or answer.remaining is None:
            found += 1
        else:
            causes = [cause.named.fault for cause in answer.causes]
            others.append(f"{chosen}: {causes}, left over at {answer.remaining.checkpoint}, next {answer.next or '-'}")
        print(seed, parts, "found" if answer.remaining is None else others[-1], f"{answer.seconds:.1f} s", flush=True)
    return found, tried, others


def half_sums(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A product with partial sums of 32 terms in float16: arithmetic that `engine.precision` does not copy."""
    total = np.zeros((x.shape[0], weight.shape[0]), dtype=np.float16)
    for start in range(0, x.shape[1], 32):
        part = x[:, start : start + 32].astype(np.float16).astype(np.float32) @ weight[:, start : start + 32].T
        total = (total + part.astype(np.float16)).astype(np.float16)
    made = total.astype(np.float32)
    return made if bias is None else made + bias


def other_order(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A product in float32 that is summed in another order than BLAS does."""
    made = np.einsum("ti,oi->to", x[:, ::-1], weight[:, ::-1], optimize=False)
    return made if bias is None else made + bias


def _with(steps: Sequence[Step], op: Callable[..., Array]) -> list[Step]:
    return [replace(step, op=op) if step.op is ops.linear else step for step in steps]


ARITHMETIC: dict[str, Callable[[Sequence[Step]], Sequence[Step]]] = {
    "f32": lambda steps: _with(steps, other_order),
    "f16 products": lambda steps: rounded(steps, "f16", storage=False),
    "f16 stored": lambda steps: rounded(steps, "f16", storage=True),
    "f16 sums": lambda steps: _with(steps, half_sums),
    "bf16 products": lambda steps: rounded(steps, "bf16", storage=False),
    "bf16 stored": lambda steps: rounded(steps, "bf16", storage=True),
    "tf32 products": lambda steps: rounded(steps, "tf32", storage=False),
    "q8 activations": lambda steps: rounded(steps, "q8", storage=False),
}


def accusations(folder: Path, seeds: range) -> dict[str, list[int]]:
    """Right engines in each arithmetic on seeded random models and prompts: [runs, said "no fault", accused somebody]."""
    counts = {name: [0, 0, 0] for name in ARITHMETIC}
    for seed in seeds:
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
            rope_base=rng.choice([1e4, 5e5, 1e6]),
        )
        model = folder / "random.gguf"
        synthesize(model, shape, weight_type=rng.choice(["f32", "f16", "bf16"]), seed=seed)
        faulty = Faulty(model)
        tokens = tokens_of(model, rng.randrange(4, 24), seed)
        right = faulty.right
        for name, arithmetic in ARITHMETIC.items():
            faulty.right = list(arithmetic(right))
            found = explain(faulty.dump(Planted(()), tokens), model, Options(budget=20))
            counts[name][0] += 1
            counts[name][1] += bool(found)
            counts[name][2] += bool(found.causes)
            if not found:
                print(f"seed {seed}, {name}: {found.first}, {[cause.named.fault for cause in found.causes]}", flush=True)
    return counts


def times(model: Path, count: int = 32) -> None:
    """The whole catalogue for a fault in all layers, every layer's output dumped, against one forward pass."""
    faulty = Faulty(model)
    tokens = tokens_of(model, count, seed=2)
    passes = []
    for _ in range(5):
        began = perf_counter()
        faulty.transformer.steps = faulty.right
        faulty.transformer.forward(tokens, faulty.transformer.start())
        passes.append(perf_counter() - began)
    forward = sorted(passes)[2]
    for name, layers, points in (
        ("rope-pairs", None, "default"),
        ("activation", None, "default"),
        ("activation", (17,), "embd,blk.*.l_out,output_norm,logits"),
        ("activation", (17,), "default"),
    ):
        parameters = CATALOGUE[name].variants({step.makes: step for step in faulty.right})[0]
        answer = explain(faulty.dump(Planted(((name, parameters, layers),)), tokens, points=points), model, Options(budget=300))
        where = "all layers" if layers is None else f"layer {layers[0]}"
        print(
            f"{name}, {where}, {points[:12]:<12} {answer.variants:>6,} variants {answer.seconds:>6.2f} s"
            f" = {answer.seconds / forward:>6.1f} forward passes of {forward * 1000:.0f} ms",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    """Print the tables that were asked for."""
    what = next((argument for argument in arguments if not argument.startswith("--")), "table")
    names = next(
        (argument[9:].split(",") for argument in arguments if argument.startswith("--models=")), ["stories", "llama", "qwen2"]
    )
    quick = "--quick" in arguments
    with tempfile.TemporaryDirectory() as folder:
        if what == "precision":
            for kind, (runs, fine, accused) in accusations(Path(folder), range(10 if quick else 100)).items():
                print(f"{kind:<16} {runs:>4} runs, {fine:>4} no fault, {accused:>3} accused")
            return
        for name, model in models(Path(folder), names):
            if what == "table":
                print_table(name, table(model, first_only=quick))
            elif what == "logits":
                print_table(f"{name}, logits", table(model, first_only=quick, points="logits", size=10, generated=16))
            elif what == "time":
                times(model)
            elif what == "combined":
                for number in (2, 3):
                    found, tried, _ = combined(model, number, range(25 if not quick else 6), budget=60.0)
                    print(f"{name}: {number} faults at once: {found} of {tried} wholly explained")


if __name__ == "__main__":
    main(sys.argv[1:])
