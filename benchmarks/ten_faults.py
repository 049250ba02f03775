"""Ten faults in each of twelve architectures, and right engines: what `parity explain` says about them.

    PYTHONPATH=tests python benchmarks/ten_faults.py run RESULTS.jsonl [--architecture gemma3]
    python benchmarks/ten_faults.py show RESULTS.jsonl > docs/ten-faults.md

The faulty engines share no code with ours (`tests/faulty_engines.py`). `run` appends a line a case and skips those that the file has
already. The search sees the default points, sixteen values per row, of 16 tokens, and nothing about the engine. Right engines are the
NumPy engine in F32, F16 and BF16 arithmetic and llama.cpp itself, on one prompt each.
"""

import argparse
import json
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

from faulty_engines import CASES, Case, bare, dump_of
from foreign_families import HABITS, Families
from msgspec.structs import replace
from planted import tokens_of

from checkpoints.answers.explain import Explanation
from checkpoints.record import Dump
from engine.synth.recipe import shape_of
from engine.synth.recipes import recipe
from parity.explain.explain import ExplainOptions, explain
from parity.models import embedded
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

TOKENS = 16
_ARITHMETIC = ("f32", "f16", "bf16")


_HEAD = f"""# Ten faults in twelve architectures

Made by `python benchmarks/ten_faults.py show RESULTS.jsonl` from the results of its `run`. The engines share no code with parity's:
either llama.cpp runs a GGUF file that was changed, or a NumPy engine of 250 lines has the fault (`tests/foreign_families.py`).
`parity explain` sees the default points of {TOKENS} tokens, sixteen values per row, and is told nothing about the engine. *named*: there
is one cause, which is the fault or an entry with the same numbers, and it explains every record. Models are synthetic, 4 to 7 layers, F32;
seconds are CPU time of the search.
"""


def model_of(name: str, folder: Path, reference: Reference) -> Path:
    """The recipe's model, in F32."""
    path, chosen = folder / f"{name}.gguf", recipe(name)
    make_by_recipe(path, chosen, shape_of(chosen), {}, kind="f32", tokenizer=embedded.path(), running=reference)
    return path


def outcome(answer: Explanation, case: Case) -> dict[str, Any]:
    """How the answer counts, and whether it names the fault and nothing besides."""
    causes = [f"{cause.named.fault} {cause.named.parameters}" for cause in answer.causes]
    if answer.first is None:
        return {"outcome": "no effect"}
    names = {named.fault for cause in answer.causes[:1] for named in (cause.named, *cause.equivalent)}
    whole = len(answer.causes) == 1 and answer.remaining is None
    if whole and not names.isdisjoint(case.names):
        return {"outcome": "named", "said": causes}
    left = answer.remaining.checkpoint if answer.remaining else "nothing"
    return {"outcome": "missed", "said": causes, "left": left, "arithmetic": answer.precision_only, "complete": answer.complete}


def judged(dump: Dump, model: Path, tokens: tuple[int, ...]) -> tuple[Explanation, float]:
    """The answer, and the CPU seconds that it took."""
    began = process_time()
    answer = explain(dump, model, ExplainOptions(tokens=tokens))
    return answer, round(process_time() - began, 2)


def run(out: Path, only: str | None) -> None:
    """Append a line for each case that the file does not have."""
    known = {json.loads(line)["key"] for line in out.read_text().splitlines()} if out.exists() else set()
    with tempfile.TemporaryDirectory() as temporary, Reference() as reference, out.open("a") as file:
        folder = Path(temporary)
        for name, cases in CASES.items():
            if only not in (None, name):
                continue
            model = model_of(name, folder, reference)
            tokens = tokens_of(model, TOKENS, seed=7)
            for case in cases:
                key = f"{name}: {case.title}"
                if key not in known:
                    answer, seconds = judged(dump_of(case, model, tokens, reference, folder), model, tokens)
                    engine = "NumPy" if isinstance(case.how, str) else "llama.cpp"
                    line = {"key": key, "model": name, "title": case.title, "engine": engine, "seconds": seconds}
                    file.write(json.dumps(line | outcome(answer, case)) + "\n")
                    file.flush()
            for title, dump, seed in right_engines(name, model, reference, folder):
                key = f"{name}: {title}, prompt {seed}"
                if key not in known:
                    answer, seconds = judged(dump, model, tokens_of(model, TOKENS, seed=seed))
                    accused = bool(answer.causes) or (answer.first is not None and not answer.precision_only)
                    causes = [f"{cause.named.fault} {cause.named.parameters}" for cause in answer.causes]
                    line = {
                        "key": key,
                        "model": name,
                        "title": title,
                        "outcome": "accused" if accused else "right",
                        "said": causes,
                    }
                    file.write(json.dumps(line | {"seconds": seconds, "arithmetic": answer.precision_only}) + "\n")
                    file.flush()


def right_engines(name: str, model: Path, reference: Reference, folder: Path) -> list[tuple[str, Dump, int]]:
    """Engines without a fault: a description, the dump, and the seed of its prompt."""
    named = []
    untouched = Case("right: llama.cpp", lambda _file: None, ())
    for seed in (8,):
        tokens = tokens_of(model, TOKENS, seed=seed)
        named.append((untouched.title, dump_of(untouched, model, tokens, reference, folder), seed))
        if recipe(name).architecture in HABITS:
            for kind in _ARITHMETIC:
                values = Families(model, arithmetic=kind).run(tokens)
                dump = bare(values, folder / "right.jsonl")
                named.append((f"right: NumPy in {kind.upper()}", replace(dump, header=None), seed))
    return named


def show(path: Path) -> None:
    """The tables in Markdown."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    faults = [line for line in lines if not line["title"].startswith("right: ")]
    right = [line for line in lines if line["title"].startswith("right: ")]
    print(_HEAD)
    print("| architecture | faults | named | missed | right engines | accused | median s | worst s |\n" + "|---" * 8 + "|")
    for name in CASES:
        mine, good = ([line for line in group if line["model"] == name] for group in (faults, right))
        seconds = sorted(line["seconds"] for line in mine) or [0.0]
        middle = seconds[len(seconds) // 2]
        named, accused = (
            sum(line["outcome"] == what for line in group) for what, group in (("named", mine), ("accused", good))
        )
        counts = f"{len(mine)} | {named} | {len(mine) - named} | {len(good)} | {accused}"
        print(f"| {name} | {counts} | {middle:.1f} | {seconds[-1]:.1f} |")
    print("\n| architecture | fault | engine | answer |\n" + "|---" * 4 + "|")
    for line in faults:
        causes = "; ".join(line.get("said", [])) or line["outcome"]
        mark = "" if line["outcome"] == "named" else f"**{line['outcome']}** "
        print(f"| {line['model']} | {line['title']} | {line['engine']} | {mark}{causes} |")


def main() -> None:
    """Run cases, or print the tables from the results so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--architecture", choices=tuple(CASES))
    chosen = parser.parse_args()
    if chosen.command == "show":
        show(chosen.results)
    else:
        run(chosen.results, chosen.architecture)


if __name__ == "__main__":
    main()
