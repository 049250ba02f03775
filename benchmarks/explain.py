"""What `parity explain` costs, in forward passes of the model, over the whole catalogue.

Run as `PYTHONPATH=tests python benchmarks/explain.py time [--model stories] [--backend numpy] [--every 1] [--scope 0] [--layer 17]
[--entries NAME,…] [--searches 3]`.
Each entry's first variant is planted into our engine, in all layers and in one layer alone, and the search sees the dump alone. A pass is
one forward pass over the same tokens on the same backend, the median of five, timed beside each entry; a search's time is the median of
`--searches`. A line says if the planted entry is not among the causes.
Two counts are printed: by time (CPU time on the host, the wall's clock on a device), and by the multiply-adds of the matrix
products. `explain_table.py` prints which entries are named.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from planted import Faulty, Planted, tokens_of

from checkpoints.answers.explain import Explanation
from checkpoints.errors import ModelError
from engine import graph
from engine.backend import Array
from engine.faults import CATALOGUE, Fault
from engine.graph import Step, WeightSource
from engine.inapplicable import NotApplicable
from engine.opened import open_plain
from engine.replay import batched, right_values
from engine.synth import Shape, synthesize
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.explain.explain import ExplainOptions, explain
from parity.models import embedded as default_model
from parity.run.graphs import recorded_graph
from parity.synth.synthetic import make_by_recipe

LAYER, TOKENS = 17, 32
EVERY_LAYER = "embd,blk.*.l_out,output_norm,logits"
# whether in one layer, and the points that are dumped
SCOPES: dict[str, tuple[bool, str]] = {
    "all layers, default points": (False, "default"),
    "one layer, every layer's output": (True, EVERY_LAYER),
    "one layer, default points": (True, "default"),
}


QWEN2 = Shape("qwen2", layers=24, width=112, heads=14, kv_heads=2, ff=256, vocab=1000)  # groups of 7, as Qwen2.5-0.5B
WIDER = Shape("qwen2", layers=24, width=256, heads=8, kv_heads=2, ff=1024, vocab=2000)
LLAMA = Shape("llama", 24, 96, 6, 3, 16, 224, 1000, biases=False, eps=1e-5, rope_base=5e5, rope_factors=True)


def models(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The models of the tables, by name."""
    makers: dict[str, Callable[[], Path]] = {
        "stories": default_model.path,
        "llama": lambda: _synthetic(folder / "llama.gguf", LLAMA),
        "qwen2": lambda: _synthetic(folder / "qwen2.gguf", QWEN2),
        "wider": lambda: _synthetic(folder / "wider.gguf", WIDER),
    }
    for name in names:
        yield name, makers[name]() if name in makers else _by_recipe(folder / f"{name}.gguf", name)


def _by_recipe(path: Path, name: str) -> Path:
    """A small model of another architecture, with as many layers as those above."""
    recipe = RECIPES[name]
    make_by_recipe(path, recipe, shape_of(recipe, layers=24), {}, tokenizer=default_model.path())
    return path


def _synthetic(path: Path, shape: Shape) -> Path:
    synthesize(path, shape, weight_type="f16", seed=7)
    return path


def named(explanation: Explanation, planted: Planted) -> bool:
    """Whether every planted fault is among the causes or their equivalents, and everything is explained."""
    if explanation.remaining is not None or not explanation.causes:
        return False
    classes = [{cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in explanation.causes]
    return all(any(name in names for names in classes) for name, _, _ in planted.faults)


@contextmanager
def multiply_adds() -> Iterator[list[int]]:
    """Counts those of the matrix products of every step that is computed meanwhile, in the one element of the list."""
    count = [0]
    plain = graph.compute

    def counted(step: Step, inputs: Sequence[Array], weights: WeightSource) -> Array:
        value = plain(step, inputs, weights)
        matrices = (weight for weight in step.weights if weight is not None and not isinstance(weight, graph.RowsOf))
        names = [weight if isinstance(weight, str) else weight.weight for weight in matrices]
        count[0] += sum(value.shape[0] * size for size in (_size(weights, name) for name in names))
        return value

    holders = (graph, right_values, batched)
    for holder in holders:
        assert holder.compute is plain  # else steps would be computed elsewhere, and not be counted
        holder.compute = counted  # type: ignore[attr-defined]
    try:
        yield count
    finally:
        for holder in holders:
            holder.compute = plain  # type: ignore[attr-defined]


def _size(weights: WeightSource, name: str) -> int:
    shape = weights.raw(name)[2]
    return shape[0] * shape[1] if len(shape) == 2 else 0


def forward(transformer: Transformer, tokens: Sequence[int], clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds of one pass, the median of five, and its multiply-adds."""
    spent, work = [], 0
    for _ in range(5):
        with multiply_adds() as count:
            began = clock()
            transformer.forward(tokens, transformer.start())
            spent.append(clock() - began)
            work = count[0]
    return median(spent), work


def _faulty(model: Path) -> Faulty:
    """The engine of a model, whose steps are lifted where they are not written by hand."""
    try:
        return Faulty(model)
    except ModelError:
        return Faulty(model, recorded_graph(model))


def times(
    name: str, model: Path, backend: str, entries: Sequence[Fault], scopes: Sequence[str], layer: int, searches: int
) -> None:
    """Print the cost for each entry, and the median and the worst of each of these scopes."""
    faulty = _faulty(model)
    right = {step.makes: step for step in faulty.right}
    transformer = open_plain(GgufModel(model), backend, recorded=partial(recorded_graph, model))
    clock = process_time if transformer.backend.name == "numpy" else perf_counter
    tokens = tokens_of(model, TOKENS, seed=2)
    for scope in scopes:
        single, points = SCOPES[scope]
        layers = (layer,) if single else None
        costs: list[tuple[float, float, float]] = []
        for fault in entries:
            if layers is not None and fault.once:
                continue
            parameters = (fault.variants(right) or [{}])[0]
            planted = Planted(((fault.name, parameters, layers),))
            try:
                seen = faulty.dump(planted, tokens, points=points)
            except (NotApplicable, ValueError):  # ValueError: NumPy's, of shapes that do not go together in this model
                continue
            seconds, work = forward(transformer, tokens, clock)  # beside each search: other work on the machine comes and goes
            durations = []
            for _ in range(searches):
                with multiply_adds() as count:
                    began = clock()
                    answer = explain(seen, model, ExplainOptions(budget=300, backend=backend))
                    durations.append(clock() - began)
            if answer.first is None:
                continue
            spent = median(durations)
            costs.append((spent / seconds, count[0] / work, spent))
            print(
                f"{name}, {scope}, {fault.name}{f' in {layer}' if single else ''}: {answer.variants:,} variants, {spent:.2f} s ="
                f" {spent / seconds:.1f} passes of {1000 * seconds:.0f} ms, {count[0] / work:.1f} by multiply-adds"
                + ("" if named(answer, planted) else ", NOT NAMED"),
                flush=True,
            )
        if not costs:
            continue
        by_time, by_work, spent_each = zip(*costs, strict=True)
        print(
            f"{name}, {scope}, {transformer.backend.device}: {len(costs)} entries;"
            f" passes by time: median {median(by_time):.1f}, worst {max(by_time):.1f};"
            f" by multiply-adds: median {median(by_work):.1f}, worst {max(by_work):.1f};"
            f" seconds: median {median(spent_each):.2f}, worst {max(spent_each):.2f}",
            flush=True,
        )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("time",))
    parser.add_argument("--model", default="stories", help="stories, llama, qwen2, wider, or a recipe, of 24 layers")
    parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="numpy")
    parser.add_argument("--every", type=int, default=1, help="only every so many entries of the catalogue")
    parser.add_argument("--entries", default=",".join(CATALOGUE), help="names with commas; all of them otherwise")
    parser.add_argument("--searches", type=int, default=3, help="of each entry, of which the median counts")
    parser.add_argument("--layer", type=int, default=LAYER, help="the one layer")
    parser.add_argument(
        "--scope",
        type=int,
        choices=range(len(SCOPES)),
        action="append",
        help=f"only this one (again for others): {', '.join(SCOPES)}",
    )
    chosen = parser.parse_args()
    scopes = [scope for number, scope in enumerate(SCOPES) if not chosen.scope or number in chosen.scope]
    with tempfile.TemporaryDirectory() as folder:
        [(name, model)] = models(Path(folder), [chosen.model])
        entries = [CATALOGUE[entry] for entry in chosen.entries.split(",")][:: chosen.every]
        times(name, model, chosen.backend, entries, scopes, chosen.layer, chosen.searches)


if __name__ == "__main__":
    main()
