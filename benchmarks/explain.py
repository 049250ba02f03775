"""How many known faults `parity explain` names, on which models, from how little, and in what time.

Run as `python benchmarks/explain.py [table|logits|time] [--quick] [--models stories,llama,qwen2]`. Each fault is planted
into our engine with each of its variants, the engine writes a dump, and the search sees the dump alone.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from checkpoints.explanation import Explanation
from engine.faults import CATALOGUE
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
        for name, model in models(Path(folder), names):
            if what == "table":
                print_table(name, table(model, first_only=quick))
            elif what == "logits":
                print_table(f"{name}, logits", table(model, first_only=quick, points="logits", size=10, generated=16))
            elif what == "time":
                times(model)


if __name__ == "__main__":
    main(sys.argv[1:])
