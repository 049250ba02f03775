"""`isolate`, `explain` and `consistency` of every architecture: a line a recipe, resumable.

    PYTHONPATH=tests python benchmarks/commands_of_architectures.py run RESULTS.jsonl [--seconds 240] [NAME …]
    PYTHONPATH=tests python benchmarks/commands_of_architectures.py show RESULTS.jsonl

Small models by recipe, 16 tokens. `isolate` holds llama.cpp itself to our definitions, with weights in F32, and in Q8_0 with ggml's
rounding; `explain` sees sixteen values per row of the default points of a llama.cpp whose file has another ε; `consistency` compares
our engine with itself at the default points.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from faulty_engines import Case, dump_of, number
from planted import tokens_of

from checkpoints.errors import ParityError
from engine.synth.recipe import Recipe, shape_of
from engine.synth.recipes import RECIPES
from parity.explain.explain import ExplainOptions, explain
from parity.models import embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

TOKENS, EPSILON = 16, 1e-3
HEAD = "| architecture | isolate, F32 | isolate, Q8_0 | explain, another ε | consistency | on |\n" + "|---" * 6 + "|"


def asked(*words: object) -> dict[str, Any]:
    """The JSON answer of a command in a process of its own, or its one line of refusal."""
    command = [sys.executable, "-P", "-m", "parity", *map(str, words), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        return {"refused": done.stderr.strip().removeprefix("parity: ")}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def isolated(model: Path, tokens: str, mode: str) -> str:
    """How many operations are proven."""
    answer = asked("isolate", "--model", model, "--tokens", tokens, "--mode", mode)
    if "refused" in answer:
        return str(answer["refused"])
    states = [operation["status"] for operation in answer["operations"]]
    return f"{states.count('proven')} of {len(states)}"


def consistent(model: Path, tokens: str) -> str:
    """Whether our engine agrees with itself, or what differs."""
    answer = asked("consistency", "--model", model, "--tokens", tokens, "--points", "default")
    if "refused" in answer:
        return str(answer["refused"])
    differs = [check["name"] for check in answer["checks"] if check["suspect"]]
    return f"differs: {', '.join(differs)}" if differs else f"{len(answer['checks'])} checks agree"


def explained(chosen: Recipe, model: Path, tokens: tuple[int, ...], reference: Reference, folder: Path) -> str:
    """What is said of another ε."""
    key = "attention.layer_norm_epsilon" if chosen.layer_norm else "attention.layer_norm_rms_epsilon"
    case = Case("another ε", number(key, EPSILON), ("norm-epsilon",))
    try:
        answer = explain(dump_of(case, model, tokens, reference, folder), model, ExplainOptions(tokens=tokens, budget=60))
    except ParityError as error:
        return str(error)
    names = {named.fault for cause in answer.causes[:1] for named in (cause.named, *cause.equivalent)}
    if len(answer.causes) == 1 and answer.remaining is None and "norm-epsilon" in names:
        return "named"
    return "no effect" if answer.first is None else "; ".join(cause.named.fault for cause in answer.causes) or "not named"


def run(out: Path, seconds: float, names: list[str]) -> None:
    """Append a line for each recipe that the file lacks, until the time is over."""
    began = monotonic()
    known = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.exists() else set()
    with tempfile.TemporaryDirectory() as temporary, Reference() as reference, out.open("a") as file:
        folder = Path(temporary)
        for name in names or RECIPES:
            if name in known or monotonic() - began > seconds:
                continue
            chosen, model, quantised = RECIPES[name], folder / f"{name}.gguf", folder / f"{name}-q8_0.gguf"
            make_by_recipe(model, chosen, shape_of(chosen), {}, kind="f32", tokenizer=embedded.path(), running=reference)
            reference.quantize(model, "q8_0", quantised)
            tokens = tokens_of(model, TOKENS, seed=7)
            text = ",".join(map(str, tokens))
            line = {
                "name": name,
                "exact": isolated(model, text, "exact"),
                "native": isolated(quantised, text, "native"),
                "explain": explained(chosen, model, tokens, reference, folder),
                "consistency": consistent(model, text),
                "on": datetime.now(UTC).date().isoformat(),
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(" | ".join(line.values()), flush=True)
            model.unlink()
            quantised.unlink()


def show(results: Path) -> None:
    """The table in Markdown."""
    print(HEAD)
    for line in sorted((json.loads(line) for line in results.read_text().splitlines()), key=lambda line: str(line["name"])):
        print(f"| {' | '.join(line.values())} |")


def main() -> None:
    """Run recipes, or print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*", help="recipes; all without")
    parser.add_argument("--seconds", type=float, default=240.0, help="after which no further recipe is begun")
    chosen = parser.parse_intermixed_args()
    if chosen.command == "show":
        show(chosen.results)
    else:
        run(chosen.results, chosen.seconds, chosen.names)


if __name__ == "__main__":
    main()
