"""Right engines in every arithmetic: does a command accuse one, or call one exact that is not?

    PYTHONPATH=tests python benchmarks/right_engines.py [-n 1000] [--from 0] [--out FILE.jsonl] [--seconds S]

Engines come in tens: a seeded small model (architecture and weight type go through all of them), its reference by llama.cpp, and our
engine in F32, F16, BF16, TF32 and 8-bit arithmetic, each as two dumps: 10, 16 or all values per row, the default points or all, bare lines
(no header, shape, statistics or sketch) or a whole dump, its arithmetic stated or not. `lint` and `diff`, without and with the model,
judge each, `isolate` all values of every other one; with `--explain` so does `explain`, which takes two fifths of the
time (`explain_right.py` has right engines of its own). What commands compute of the model itself is computed once (`kept_runs.py`).

*accused*: lint finds an error, or diff says divergence, or explain names a cause or a place. *called exact*: an answer that says, without
"assumed", that an engine in lower arithmetic agrees as float32 does. *suspected* (lint's suspicions; a divergence that blames no
operation, such as "8-bit arithmetic, not declared" and "a fault, or what lower arithmetic costs this model"; explain's sentence on an
operation of a lower arithmetic, or on weights of a lower type where the engine keeps such) is no accusation and is counted separately.

With `--further` they are five of the kinds of `kinds_of_engine.py` and `kinds_of_kernel.py`, drawn anew for each model.

`--out` keeps one line an engine; a run with the same file goes on after its last line. `--seconds` stops it after that time.
"""

import argparse
import json
import os
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

from kept_runs import kept_runs
from kind import Arithmetic, Kind
from kinds_of_engine import ALGORITHMS, ARITHMETIC, CUTTING, HALF_SUMS, MIXED, multiplies
from kinds_of_kernel import KERNELS, MIXED_KERNELS
from msgspec.structs import replace
from planted import Faulty, tokens_of
from written import Written

from checkpoints.answers.isolate import WRONG
from checkpoints.answers.lint import ERROR
from checkpoints.columns import open_dump
from checkpoints.errors import InputError, ParityError
from checkpoints.formats import load
from checkpoints.points import parse
from checkpoints.record import Dump
from engine import ops
from engine.graph import in_one_pass
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options, compare
from parity.diff.readings.readings import TYPE
from parity.explain import budget
from parity.explain.case import ExplainOptions
from parity.explain.input import explain_dump
from parity.explain.on_model import compared_on
from parity.isolate.isolate import IsolateRequest, isolate
from parity.lint.lint import lint
from parity.lint.model_facts import ModelFacts
from parity.models.embedded import path as embedded
from parity.run.ours import OursJob, dump
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reference.jobs import DumpJob

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q5_1", "q4_k_m", "q6_k", "iq4_nl", "q3_k_m")
# Patterns of a divergence that blames no operation: rounding, or a question that only --model decides.
UNDECIDED = ("eight-bits", "undecided", "precision", "drift", "rounded")
# What `explain` says of an operation that is right as a lower arithmetic makes it (`parity.explain.rounding.mixed`).
_OF_ROUNDING = ("arithmetic rounds it", "arithmetic makes there", "which nothing states")
EACH = 2  # dumps of one engine
MOST_LAYERS = 8
_BUDGET = 20.0  # seconds of processor time that `explain` may search; for a right engine it needs a fraction of one

PER_MODEL = EACH * len(ARITHMETIC)
UNSTATED = {**MIXED, **MIXED_KERNELS}  # no dump of these says what they keep in a lower type
FURTHER = {**ALGORITHMS, **CUTTING, **KERNELS, **UNSTATED}  # of which as many kinds are drawn for each model


@dataclass(frozen=True)
class Model:
    """A small model with its reference: the engine, a prompt, and llama.cpp's dump of it."""

    name: str
    path: Path
    faulty: Faulty
    tokens: tuple[int, ...]
    ref: Dump


def model_of(seed: int, folder: Path, reference: Reference) -> Model:
    """The seed's model; raises ParityError where our engine or llama.cpp has none of this kind."""
    names = sorted(RECIPES)
    name, kind = names[seed * 37 % len(names)], TYPES[seed % len(TYPES)]
    path, draw = folder / "model.gguf", random.Random(seed)
    chosen = RECIPES[name]
    make_by_recipe(path, chosen, shape_of(chosen), {}, kind=kind, seed=seed, tokenizer=embedded(), running=reference)
    if reference.describe(path).n_layers > MOST_LAYERS:
        raise InputError(f"{name} has too many layers for a thousand engines", "Another seed takes another architecture.")
    graph = reference.graph(path)
    faulty = Faulty(path, graph)
    tokens = tokens_of(path, draw.randrange(4, 10), seed)
    out = folder / "ref.jsonl"
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=None, binary=True))
    return Model(f"{name} {kind}", path, faulty, tokens, load(out))


def computed(model: Model, arithmetic: Arithmetic, after: int = 0) -> Dump:
    """The whole dump of an engine in this arithmetic, its encoder's too if there is one; with `after`, of so many passes of one token."""
    transformer = model.faulty.transformer
    encoder = transformer.encoder
    cut = after and encoder is None and transformer.single is None and not in_one_pass(model.faulty.right)
    portions = (len(model.tokens) - after, *[1] * after) if cut else ()
    transformer.encoder = None if encoder is None else arithmetic(encoder)
    transformer.steps = arithmetic(model.faulty.right)
    out = model.path.with_name("ours.jsonl")
    try:
        dump(
            transformer, OursJob(out=out, tokens=model.tokens, portions=portions, points="all", slice_size=1 << 20, binary=True)
        )
    finally:
        transformer.steps, transformer.encoder = model.faulty.right, encoder
    return load(out)


def _shown(whole: Dump, kind: Kind) -> Dump:
    """The full dump that an engine of this kind can write."""
    assert whole.header is not None
    header = replace(whole.header, kv_type="") if kind.open_cache else whole.header
    return replace(
        whole, header=header, points={name: rows for name, rows in whole.points.items() if parse(name).kind not in kind.without}
    )


def judged(model: Model, ours: Dump, way: Written, kind: Kind, *, explained: bool) -> dict[str, str]:
    """What each command says of a right engine's dump: "right", "accused: …", "called exact" or "suspected: …"."""
    compute = kind.compute if way.bare and way.stated else None
    mixed = kind.compute == "f32" and not kind.exact  # then values and weights of a lower type are rightly called that
    findings = lint(ours, ModelFacts(model.faulty.transformer.model)).findings
    errors = [finding.rule for finding in findings if finding.severity == ERROR]
    answers = {
        "lint": f"accused: {errors}"
        if errors
        else f"suspected: {[finding.rule for finding in findings]}"
        if findings
        else "right"
    }
    for name, answer in (
        ("diff", lambda: compare(ours, model.ref, Options(compute=compute))),
        ("diff --model", lambda: compared_on(ours, model.ref, Options(compute=compute), model.path).verdict),
    ):
        verdict = answer()
        precision, first = verdict.precision, verdict.first_divergence
        if first is not None and verdict.pattern is not None and verdict.pattern.code in UNDECIDED:
            answers[name] = "suspected"
        elif first is not None:
            answers[name] = f"accused: {first.checkpoint} {first.token_idx} {first.nmse:.1e}"
        elif any(fault.kind != TYPE or not mixed for fault in verdict.record_faults):
            answers[name] = f"accused: {[(fault.checkpoint, fault.kind) for fault in verdict.record_faults[:3]]}"
        elif not kind.exact and precision is not None and precision.arithmetic == "f32" and _visible(verdict):
            answers[name] = "called exact"
        else:
            answers[name] = "right"
    if not explained:
        return answers
    answer = explain_dump(ours, model.path, ExplainOptions(tokens=model.tokens, budget=_BUDGET, compute=compute))
    named = mixed and bool(answer.causes) and all(cause.named.fault == "weights-rounded" for cause in answer.causes)
    if (named or not answer.causes) and any(sentence in answer.law for sentence in _OF_ROUNDING):
        answers["explain"] = f"suspected: {answer.law}"
    elif named and answer.remaining is None:
        answers["explain"] = f"suspected: {answer.causes[0].named.sentence}"
    elif answer.left_open:
        answers["explain"] = f"suspected: {answer.left_open}"
    elif answer.unjudged:
        answers["explain"] = f"suspected: {answer.unjudged[0]} and what follows cannot be judged"
    elif answer.causes or not answer:
        causes = [(cause.named.fault, cause.named.layers) for cause in answer.causes]
        answers["explain"] = f"accused: {causes} {answer.first} {answer.law} {answer.looks_like} {answer.placed}"
    else:
        answers["explain"] = "right"
    return answers


def isolated(model: Model, whole: Dump, stated: str, reference: Reference) -> str:
    """What `isolate` says of a right engine that writes every value whole: "right" or "accused: …"; it states its arithmetic or not."""
    assert whole.header is not None
    path = model.path.with_name("whole.jsonl")
    header = replace(whole.header, source="an engine", compute=stated, dataflow=None, columns=None)
    with open_dump(path, header, binary=True) as writer:
        for rows in whole.points.values():
            writer.rows(rows)
    answer = isolate(IsolateRequest(model.path, dump=path, tokens=model.tokens), reference)
    wrong = [f"{item.name} {item.nmse or 0:.1e} {item.reason}" for item in answer.operations if item.status == WRONG]
    return f"accused: {[*wrong, *answer.findings]}" if wrong or answer.findings else "right"


def _visible(verdict: Any) -> bool:
    """Whether any record differs by more than float32's noise; an arithmetic that changes no recorded point is rightly called exact."""
    return verdict.worst is not None and verdict.worst.of_limit > 1


def engines(
    seed: int, folder: Path, reference: Reference, *, explained: bool, further: bool = False
) -> Iterator[dict[str, Any]]:
    """The ten engines of one model, each with every command's judgement of it."""
    try:
        model = model_of(seed, folder, reference)
    except ParityError as error:
        yield from ({"seed": seed, "number": n, "refused": str(error)} for n in range(PER_MODEL))
        return
    # What is found must not depend on what else the machine does.
    with kept_runs(model.faulty.transformer), patch.object(budget, "perf_counter", process_time):
        draw = random.Random(seed)
        kinds = _further_of(model, draw) if further else ARITHMETIC
        yield from _engines_of(model, seed, kinds, draw, reference, explained=explained)


def _further_of(model: Model, draw: random.Random) -> dict[str, Kind]:
    """As many further kinds as there are arithmetics, of those that change anything in this model."""
    right = list(model.faulty.right)
    acting = {
        name: ways
        for name, kind in FURTHER.items()
        if (ways := tuple(way for way in kind.ways if any(a is not b for a, b in zip(way(right), right, strict=True))))
    }
    chosen = draw.sample(sorted(acting), min(len(acting), len(ARITHMETIC)))
    return {name: changed(FURTHER[name], ways=acting[name]) for name in chosen}


def _engines_of(
    model: Model, seed: int, kinds: dict[str, Kind], draw: random.Random, reference: Reference, *, explained: bool
) -> Iterator[dict[str, Any]]:
    number = 0
    layers = model.faulty.transformer.model.info.layers or 1
    for name, kind in kinds.items():
        way_of_it = draw.choice(kind.ways)
        if way_of_it is HALF_SUMS and any(step.op is not ops.linear and multiplies(step) for step in model.faulty.right):
            way_of_it = kind.ways[0]  # experts would stay in float32: a mixture of arithmetics
        whole = _shown(computed(model, way_of_it, kind.after), kind)
        for nth in range(EACH):
            way = Written.drawn(draw)
            if name in UNSTATED:
                way = changed(way, stated=False)  # no word says it
            began = process_time()
            line = {
                "seed": seed,
                "number": number,
                "model": model.name,
                "kind": name,
                "way": kind.ways.index(way_of_it),
                "written": vars(way),
            }
            try:
                line["said"] = judged(model, way.of(whole, layers, kind.compute), way, kind, explained=explained)
                if nth == 0:
                    line["said"]["isolate"] = isolated(model, whole, kind.compute if way.stated else "", reference)
            except ParityError as error:
                line["said"] = {"all": f"accused: refused, {error}"}
            except Exception as error:  # an internal error is a finding, too, and the sweep goes on
                line["said"] = {
                    "all": f"accused: {type(error).__name__} {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
                }
            yield line | {"seconds": round(process_time() - began, 2)}
            number += 1


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The judgements counted by arithmetic and command."""
    judged_lines = [line for line in lines if "said" in line]
    rows = [f"{len(judged_lines)} engines, {len(lines) - len(judged_lines)} refused; not right, of all:"]
    for kind in dict.fromkeys(line["kind"] for line in judged_lines):
        here = [line["said"] for line in judged_lines if line["kind"] == kind]
        counts = Counter(
            f"{name} {text.partition(':')[0]}" for answers in here for name, text in answers.items() if text != "right"
        )
        rows.append(
            f"{kind:<28} {len(here):>4}  {', '.join(f'{what} {n}' for what, n in sorted(counts.items())) or 'all right'}"
        )
    return "\n".join(rows)


def main() -> None:
    """Go on where the file ends, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first model's seed")
    parser.add_argument("--out", type=Path, default=Path("right_engines.jsonl"))
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of processor time; then the rest is left for another run"
    )
    parser.add_argument("--explain", action="store_true", help="explain each engine as well")
    parser.add_argument("--further", action="store_true", help="other algorithms and mixed arithmetics")
    options = parser.parse_args()
    lines = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    finished = {seed for seed, n in Counter(line["seed"] for line in lines).items() if n == PER_MODEL}
    lines = [line for line in lines if line["seed"] in finished]
    with tempfile.TemporaryDirectory() as folder, Reference() as reference:
        os.environ["PARITY_CACHE"] = folder
        seed = options.first
        while sum("said" in line for line in lines) < options.n and process_time() < options.seconds:
            if seed not in finished:
                results = list(engines(seed, Path(folder), reference, explained=options.explain, further=options.further))
                lines += results
                with options.out.open("a") as out:
                    out.writelines(json.dumps(line) + "\n" for line in results)
                for line in results:
                    odd = {name: text for name, text in line.get("said", {}).items() if text != "right"}
                    if odd:
                        print(line["seed"], line["model"], line["kind"], line["written"], odd, flush=True)
                if "refused" in results[0]:
                    print(seed, results[0]["refused"], flush=True)
            seed += 1
    print(table(lines))


if __name__ == "__main__":
    main()
