"""Every entry of the catalogue, planted into models: does `parity explain` name it, and how long does that take?

    PYTHONPATH=tests python benchmarks/explain_table.py run RESULTS.jsonl --model stories --what values [--variants 4]
    PYTHONPATH=tests python benchmarks/explain_table.py show RESULTS.jsonl > docs/explain-table.md

`run` appends a line a variant and skips those that the file has already, so that it can be stopped and started again. The
search sees only the dump. `--what`: `values`, the default seven points with sixteen values of 24 tokens, fault in all layers;
`layer`, the same with the fault in layer 17 only; `logits`, ten logits a token, 24 tokens and 16 generated ones.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

from explain import models, named
from planted import Faulty, Planted, tokens_of

from engine.faults import CATALOGUE
from engine.inapplicable import NotApplicable
from parity.explain.explain import ExplainOptions, explain

TOKENS, GENERATED, LAYER = 24, 16, 17
WHAT = {"values": "all layers", "layer": f"layer {LAYER} only", "logits": "ten logits"}
_HEAD = f"""# Which faults `parity explain` names

Made by `python benchmarks/explain_table.py show RESULTS.jsonl` from the results of its `run`. Each entry of the catalogue is planted in our
engine with some of its variants, evenly spaced; the engine writes a dump of values only (no sketch, no statistics), and the search
sees nothing but that dump. *all layers*: the seven default points, sixteen values per row, {TOKENS} tokens. *layer {LAYER} only*:
the same, but the fault is in that layer alone, at which no point was recorded.
*ten logits*: ten values of the logits and nothing else, {TOKENS} tokens and
{GENERATED} generated ones. A cell says how many of the variants that act in this model were named (the variant itself, or one with the same
numbers that is listed beside it), and the mean CPU time of the search. "no effect": the dump equals the right engine's. "–": the
fault does not apply to the model. stories: 24 layers of width 256; llama, qwen2: synthetic, 24 layers of width 96 and 112 (7 query
heads for each key head).

Entries that act in none of these models (weight types that they do not have, scaled frequencies, one projection for Q, K and V) are
tested in `tests/test_explain_catalogue.py`, which names each entry on a model in which it acts. Those that only other architectures can
have (norms of heads, windows, experts, recurrent layers) are tested in `tests/test_explain_architectures.py` and have no row here.
"""


def spread(values: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of the values, evenly spaced; all of them if there are no more than that."""
    if len(values) <= count:
        return list(values)
    return [values[number * len(values) // count] for number in range(count)]


def cases(faulty: Faulty, what: str, count: int, entries: Sequence[str]) -> Iterator[Planted]:
    """Each of these entries with up to `count` of its variants."""
    right = {step.makes: step for step in faulty.right}
    for fault in (CATALOGUE[name] for name in entries):
        if what == "layer" and (fault.once or not any(f"blk.{LAYER}.{kind}" in right for kind in fault.kinds)):
            continue
        for parameters in spread(fault.variants(right), count):
            yield Planted(((fault.name, parameters, (LAYER,) if what == "layer" else None),))


def tried(faulty: Faulty, planted: Planted, what: str, forward: float) -> dict[str, Any]:
    """One variant's outcome, and the time that the search took, in CPU seconds and in forward passes."""
    tokens = tokens_of(faulty.model, TOKENS + (GENERATED if what == "logits" else 0), seed=1)
    # An engine whose prompt is shifted decodes the token that it is given: it is one shift of one sequence.
    shifted = CATALOGUE[planted.faults[0][0]].group == "tokens"
    generated = GENERATED if what == "logits" and not shifted else 0
    points, size = ("logits", 10) if what == "logits" else ("default", 16)
    try:
        seen = faulty.dump(planted, tokens, points=points, size=size, generated=generated)
    except (NotApplicable, ValueError):  # ValueError: NumPy's, of shapes that do not go together in this model
        return {"outcome": "impossible"}
    began = process_time()
    answer = explain(seen, faulty.model, ExplainOptions(tokens=tokens))
    seconds = process_time() - began
    result = {"seconds": round(seconds, 3), "passes": round(seconds / forward, 1)}
    if answer.first is None:
        return {"outcome": "no effect", **result}
    if named(answer, planted):
        return {"outcome": "named", **result}
    causes = [f"{cause.named.fault} {cause.named.parameters}" for cause in answer.causes]
    if answer.precision_only:
        reason = f"taken for {answer.precision_only} arithmetic"
    elif causes and answer.remaining is None:
        reason = f"explained by {', '.join(causes)}"
    elif not answer.complete:
        reason = "out of time"
    else:
        reason = (
            f"left over at {answer.remaining.checkpoint if answer.remaining else '-'}; causes: {', '.join(causes) or 'none'}"
        )
    return {"outcome": "missed", "reason": reason, **result}


def forward_time(faulty: Faulty) -> float:
    """CPU seconds of one forward pass, the best of five."""
    tokens, best = tokens_of(faulty.model, TOKENS, seed=1), float("inf")
    for _ in range(5):
        faulty.transformer.steps = faulty.right
        began = process_time()
        faulty.transformer.forward(tokens, faulty.transformer.start())
        best = min(best, process_time() - began)
    return best


def run(out: Path, name: str, what: str, count: int, entries: Sequence[str]) -> None:
    """Append a line for each variant that the file does not have."""
    known = {line["key"] for line in _lines(out)} if out.exists() else set()
    with tempfile.TemporaryDirectory() as folder, out.open("a", encoding="utf-8") as file:
        [(_, model)] = models(Path(folder), [name])
        faulty = Faulty(model)
        forward = forward_time(faulty)
        for planted in cases(faulty, what, count, entries):
            fault, parameters, _ = planted.faults[0]
            key = f"{name} {what} {fault} {parameters}"
            if key not in known:
                line = {"key": key, "model": name, "what": what, "fault": fault, "parameters": str(parameters)}
                file.write(json.dumps(line | tried(faulty, planted, what, forward)) + "\n")
                file.flush()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def show(path: Path) -> None:
    """The table in Markdown, then what was missed and why."""
    lines = _lines(path)
    columns = sorted(
        {(line["what"], line["model"]) for line in lines}, key=lambda column: (list(WHAT).index(column[0]), column[1])
    )
    print(_HEAD)
    print("| fault | " + " | ".join(f"{model}, {WHAT[what]}" for what, model in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for fault in CATALOGUE:
        cells = []
        for what, model in columns:
            mine = [line for line in lines if (line["what"], line["model"], line["fault"]) == (what, model, fault)]
            cells.append(_cell(mine))
        print(f"| {fault} | " + " | ".join(cells) + " |")
    print("\n| | variants that act | named | missed | median s | worst s | median passes | worst |\n" + "|---" * 8 + "|")
    for what, model in columns:
        mine = [line for line in lines if (line["what"], line["model"]) == (what, model)]
        print(f"| {model}, {WHAT[what]} | {_summary(mine)} |")
    missed = [line for line in lines if line["outcome"] == "missed"]
    print("\nMissed:\n" if missed else "\nMissed: none.")
    for line in missed:
        print(f"- {line['model']}, {WHAT[line['what']]}: {line['fault']} {line['parameters']}: {line['reason']}")


def _cell(lines: Sequence[dict[str, Any]]) -> str:
    counts = Counter(line["outcome"] for line in lines)
    acting = counts["named"] + counts["missed"]
    if not acting:
        return "no effect" if counts["no effect"] else "–"
    seconds = sum(line["seconds"] for line in lines if line["outcome"] in ("named", "missed")) / acting
    return f"{counts['named']}/{acting}, {seconds:.1f} s"


def _summary(lines: Sequence[dict[str, Any]]) -> str:
    acting = [line for line in lines if line["outcome"] in ("named", "missed")]
    seconds, passes = (sorted(line[what] for line in acting) or [0.0] for what in ("seconds", "passes"))
    named = sum(line["outcome"] == "named" for line in acting)
    middle = len(seconds) // 2
    return (
        f"{len(acting)} | {named} | {len(acting) - named} | {seconds[middle]:.2f} | {seconds[-1]:.2f}"
        f" | {passes[middle]:.0f} | {passes[-1]:.0f}"
    )


def main() -> None:
    """Run a part of the table, or print it from the results so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", choices=("stories", "llama", "qwen2"), default="stories")
    parser.add_argument("--what", choices=tuple(WHAT), default="values")
    parser.add_argument(
        "--variants", type=int, default=1000, help="of each entry, at most, evenly spaced; all of them otherwise"
    )
    parser.add_argument("--entries", default=",".join(CATALOGUE), help="names with commas; all of them otherwise")
    chosen = parser.parse_args()
    if chosen.command == "show":
        show(chosen.results)
    else:
        run(chosen.results, chosen.model, chosen.what, chosen.variants, chosen.entries.split(","))


if __name__ == "__main__":
    main()
