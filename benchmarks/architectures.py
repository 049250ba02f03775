"""Every architecture computed from llama.cpp's graph: at every point, in exact mode, and against itself in other portions.

    python benchmarks/architectures.py [--prompts 5,33] [--generate 4] [--out docs/architectures.md] [NAME …]

Small models are made by recipe. `run`: our engine and llama.cpp at every point of a prompt (and of tokens generated after the first
prompt); where a record is over the table's limit, float64 decides, as in `parity run`. `consistency`: the prompt in one pass, in chunks,
and token by token. The last table has the time of a qwen2 through steps lifted from its graph, against those written by hand.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

from msgspec.structs import replace

from checkpoints.errors import ParityError
from checkpoints.graph import RecordedGraph
from engine.backend import choose
from engine.lift import lift
from engine.synth import shape_like, synthesize
from engine.synth.recipe import Recipe, shape_of
from engine.synth.recipes import RECIPES
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.consistency.consistency import ConsistencyRequest, consistency
from parity.explain.on_model import compared_on
from parity.models.embedded import path as embedded
from parity.run.request import Request
from parity.run.session import run
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

_WIDE = {"layers": 8, "width": 896, "heads": 14, "kv_heads": 2, "ff": 4864}  # a third of the layers of a 0.5 B model
_TOKENS, _TIMES, _LAYERS = 32, 5, 32


@dataclass(frozen=True)
class Row:
    """One architecture: what each command says of it."""

    name: str
    run: str
    worst: str
    consistency: str


def ids(count: int) -> tuple[int, ...]:
    """Token ids that all differ."""
    return tuple(50 + (37 * i + 11) % 1900 for i in range(count))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="recipes; all without")
    parser.add_argument("--prompts", default="5,33", help="lengths of the prompts")
    parser.add_argument("--generate", type=int, default=4, help="tokens generated after the first prompt")
    parser.add_argument("--layers", type=int, default=_WIDE["layers"], help="layers of the model that is timed")
    parser.add_argument("--out", type=Path, help="a file for the tables")
    options = parser.parse_args()
    prompts = [int(text) for text in options.prompts.split(",")]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or RECIPES:
            rows.append(_measured(RECIPES[name], prompts, options.generate, Path(folder)))
            print(" | ".join(vars(rows[-1]).values()), flush=True)
        timed = _timed(Path(folder), options.layers)
    text = _tables(rows, timed, prompts, options.generate)
    print(text)
    if options.out:
        options.out.write_text(text)
    sys.exit(0 if all(row.run == "parity" for row in rows) else 1)


def _measured(chosen: Recipe, prompts: Sequence[int], generate: int, folder: Path) -> Row:
    model = folder / "model.gguf"
    make_by_recipe(model, chosen, shape_of(chosen), {}, tokenizer=embedded())
    outcome, compared, worst, where = "parity", 0, 0.0, ""
    try:
        for number, count in enumerate(prompts):
            request = Request(
                model=model, tokens=ids(count), points="all", generate=generate if not number else 0, out=folder / "run"
            )
            try:
                verdict = run(request, judge=partial(compared_on, model=model)).verdict
            except ParityError as error:
                if error.code != "generate":  # an encoder, or a decoder that sees both ways
                    raise
                verdict = run(replace(request, generate=0), judge=partial(compared_on, model=model)).verdict
            compared += verdict.compared
            if verdict.worst is not None and verdict.worst.nmse > worst:
                worst, where = verdict.worst.nmse, verdict.worst.checkpoint
            if not verdict and verdict.first_divergence is not None:
                outcome = f"divergence at {verdict.first_divergence.checkpoint}, {count} tokens"
    except ParityError as error:
        return Row(chosen.name, f"refused: {error.message}", "", "")
    return Row(chosen.name, outcome, f"{worst:.1e} at {where}, {compared:,} records", _consistent(model, max(prompts)))


def _consistent(model: Path, count: int) -> str:
    try:
        answer = consistency(ConsistencyRequest(run=Request(model=model, tokens=ids(count), points="all")))
    except ParityError as error:
        return f"refused: {error.message}"
    wrong = [check.name for check in answer.checks if not check.verdict]
    return f"differs: {', '.join(wrong)}" if wrong else "consistent"


def _timed(folder: Path, layers: int) -> dict[str, float]:
    """Seconds, and ratios within this run: a prompt and a token through lifted steps against the written list; the lift; the recording."""
    times: dict[str, float] = {}
    written = folder / "written.gguf"
    synthesize(written, shape_like("tiny", **_WIDE | {"layers": layers}), weight_type="f16", tokenizer=embedded())
    deep = folder / "deep.gguf"
    synthesize(deep, shape_like("tiny", layers=_LAYERS), tokenizer=embedded())
    with Reference() as reference:
        recorded = reference.graph(written)
        began = perf_counter()
        many = reference.graph(deep)
        times[f"recording the graph of {_LAYERS} layers (with loading the model)"] = perf_counter() - began
    times["lifting it, the worst of five"] = max(_lifted(many) for _ in range(_TIMES))
    engines = (_engine(written, None), _engine(written, recorded))
    pairs = [[_forward(engine) for engine in engines] for _ in range(_TIMES)]
    for at, what in enumerate((f"a prompt of {_TOKENS} tokens", "one more token")):
        times[f"{what}, written by hand (qwen2)"] = statistics.median(by_hand[at] for by_hand, _ in pairs)
        times[f"{what}, through steps lifted from its graph"] = statistics.median(lifted[at] for _, lifted in pairs)
        times[f"{what}: ratio, the worst of five"] = max(lifted[at] / by_hand[at] for by_hand, lifted in pairs)
    return times


def _engine(model: Path, recorded: RecordedGraph | None) -> Transformer:
    engine = Transformer(GgufModel(model), choose("numpy"), recorded=recorded)
    engine.forward(ids(_TOKENS), engine.start())  # weights are dequantised once
    return engine


def _lifted(recorded: RecordedGraph) -> float:
    began = process_time()
    lift(recorded)
    return process_time() - began


def _forward(engine: Transformer) -> tuple[float, float]:
    """Seconds of processor time: a prompt, and one token behind it."""
    sequence, began = engine.start(), process_time()
    engine.forward(ids(_TOKENS), sequence)
    prompt = process_time()
    engine.forward(ids(1), sequence)
    return prompt - began, process_time() - prompt


def _tables(rows: Sequence[Row], timed: dict[str, float], prompts: Sequence[int], generate: int) -> str:
    right = sum(row.run == "parity" for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Made by `python benchmarks/architectures.py`: small models made by recipe, prompts of {' and '.join(map(str, prompts))} tokens,",
        f"{generate} tokens generated after the first, every point in exact mode. `run` says parity if no record exceeds its limit",
        "(1e-10, 1e-09 for logits, or a multiple of the reference's own distance from float64 where that is larger).",
        f"{right} of {len(rows)} are parity.",
        "",
        "| architecture | run | worst NMSE | consistency |",
        "|---|---|---|---|",
        *(f"| {row.name} | {row.run} | {row.worst} | {row.consistency} |" for row in rows),
        "",
        "| time | seconds, or ratio |",
        "|---|---|",
        *(f"| {name} | {seconds:.3f} |" for name, seconds in timed.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
