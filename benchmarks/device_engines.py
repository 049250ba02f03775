"""Right engines and wrong ones whose products a real device computes: is one accused, or called exact that is not, or acquitted?

    PYTHONPATH=tests:benchmarks python benchmarks/device_engines.py make FOLDER        # small models, with llama.cpp's dumps of them
    PYTHONPATH=tests:benchmarks python benchmarks/device_engines.py compute FOLDER     # where the device is: needs PyTorch, no llama.cpp
    PYTHONPATH=tests:benchmarks python benchmarks/device_engines.py judge FOLDER [--only TEXT] [--seconds S]

The products of the 1,000 engines of `right_engines.py` are rounded as theory says; here cuBLAS and PyTorch's fused attention compute them
(`device_kinds.py`), CuPy the rest: a prompt in one pass and two tokens after it one by one. `judge` cuts each engine's whole dump into
ways of writing as `right_engines.py` does, and counts its answers as that does. Of an engine with a mistake the answers
that find no fault are shown, to be read by hand: a mistake may be smaller than what its arithmetic costs.
"""

import argparse
import json
import random
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints.errors import ParityError
from checkpoints.formats import load
from checkpoints.graph import RecordedGraph
from checkpoints.record import Dump
from engine.backend import choose
from engine.graph import Step, in_one_pass
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.run.ours import OursJob, dump

if TYPE_CHECKING:
    from device_kinds import DeviceKind
    from right_engines import Model
    from written import Written

ARCHITECTURES = {
    **{"llama": "f16", "qwen2": "q8_0", "qwen3": "bf16", "phi3": "f32", "gemma3": "f16", "gpt2": "f32", "cohere2": "bf16"},
    **{
        "qwen3moe": "f16",
        "gpt-oss": "f16",
        "deepseek2": "bf16",
        "mamba2": "f32",
        "rwkv7": "f16",
        "qwen3next": "bf16",
        "lfm2": "q8_0",
    },
}
PROMPT, AFTER = 6, 2  # tokens of the first pass, and passes of one token behind it
WAYS = 2  # dumps of one right engine that are judged
WRONG = 2  # mistakes in each model
SEED = 230000
_WHOLE = 1 << 13  # longer than these models' rows; the stage on a device has room for so many values of each


def make(folder: Path) -> None:
    """Models, prompts, llama.cpp's graphs and its dumps."""
    from planted import tokens_of

    from engine.synth import Shape, synthesize
    from engine.synth.recipe import shape_of
    from engine.synth.recipes import RECIPES
    from parity.models.embedded import path as embedded
    from parity.synth.synthetic import make_by_recipe
    from reference.client import Reference
    from reference.jobs import DumpJob

    with Reference() as reference:
        for number, (name, kind) in enumerate(ARCHITECTURES.items()):
            there = folder / name
            there.mkdir(parents=True, exist_ok=True)
            path, seed = there / "model.gguf", SEED + number
            if name in RECIPES:
                recipe = RECIPES[name]
                make_by_recipe(
                    path, recipe, shape_of(recipe), {}, kind=kind, seed=seed, tokenizer=embedded(), running=reference
                )
            else:
                synthesize(path, Shape(name, 3, 192, 6, 2, ff=512, biases=name == "qwen2"), weight_type=kind, seed=seed)
            tokens = tokens_of(path, PROMPT + AFTER, seed)
            graph = reference.graph(path)
            (there / "graph.json").write_text(json.dumps(graph.to_json()))
            (there / "tokens.json").write_text(json.dumps(tokens))
            reference.dump(DumpJob(path, there / "ref.jsonl", tokens, points="all", slice_size=None, binary=True))


def compute(folder: Path, out: Path, only: str) -> None:
    """The whole dump of every engine, as an archive for each model."""
    from device_kinds import KINDS, MISTAKES

    for there in sorted(path.parent for path in folder.glob("*/graph.json")):
        began = perf_counter()
        graph = RecordedGraph.from_json(json.loads((there / "graph.json").read_text()))
        tokens = tuple(json.loads((there / "tokens.json").read_text()))
        transformer = Transformer(GgufModel(there / "model.gguf"), choose("auto"), recorded=graph)
        with tempfile.TemporaryDirectory() as scratch:
            for name, kind in KINDS.items():
                if only in name:
                    _write(transformer, kind, transformer.steps, tokens, Path(scratch) / f"{name}.jsonl")
            draw, planted = random.Random(there.name), 0
            for name in draw.sample(sorted(MISTAKES), len(MISTAKES)):
                wrong, chosen = MISTAKES[name](transformer.steps), draw.choice(list(KINDS))
                if wrong is not None and only in chosen and planted < WRONG:
                    planted += 1
                    _write(transformer, KINDS[chosen], wrong, tokens, Path(scratch) / f"{chosen} - {name}.jsonl")
            with tarfile.open(out / f"{there.name}.tar.xz", "w:xz", preset=1) as archive:
                for file in sorted(Path(scratch).iterdir()):
                    archive.add(file, file.name)
        print(f"{there.name}: {perf_counter() - began:.1f} s", flush=True)


def ways_of(model: str, engine: str) -> "list[Written]":
    """How an engine's dumps are written."""
    from written import Written

    draw = random.Random(f"{model} {engine}")
    return [Written.drawn(draw) for _ in range(WAYS)]


def _write(transformer: Transformer, kind: "DeviceKind", steps: Sequence[Step], tokens: tuple[int, ...], out: Path) -> None:
    """The dump of an engine with these steps in that arithmetic: in one pass if a pass over one token has steps of its own."""
    right, single = transformer.steps, transformer.single
    portions = () if in_one_pass(right) or single is not None else (PROMPT, *[1] * AFTER)
    transformer.steps, transformer.single = kind(steps), None
    ways = ways_of(transformer.model.path.parent.name, out.stem)
    points = "all" if any(way.points == "all" for way in ways) else "default"
    size = max(way.size or _WHOLE for way in ways)
    try:
        with np.errstate(all="ignore"):
            dump(transformer, OursJob(out=out, tokens=tokens, portions=portions, points=points, slice_size=size, binary=True))
    except Exception as error:  # the others are still of use
        print(f"{out.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        for file in out.parent.glob(f"{out.stem}.*"):
            file.unlink()
    finally:
        transformer.steps, transformer.single = right, single


def judge(folder: Path, only: str, seconds: float) -> None:
    """What each command says of every engine; a line each in FOLDER/judged.jsonl, which a later run goes on with."""
    from kept_runs import kept_runs
    from right_engines import table

    file = folder / "judged.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    finished = {(line["model"], line["engine"]) for line in lines}
    for there in sorted(path.parent for path in folder.glob("*/graph.json")):
        if not (folder / f"{there.name}.tar.xz").exists() or process_time() > seconds:
            continue
        model = _model(there)
        with tempfile.TemporaryDirectory() as scratch, kept_runs(model.faulty.transformer):
            with tarfile.open(folder / f"{there.name}.tar.xz") as archive:
                archive.extractall(scratch, filter="data")
            for path in sorted(Path(scratch).glob("*.jsonl")):
                if only in f"{there.name} {path.stem}" and (there.name, path.stem) not in finished and process_time() < seconds:
                    for line in _judged(model, path):
                        lines.append(line)
                        with file.open("a") as out:
                            out.write(json.dumps(line) + "\n")
                        if line["odd"]:
                            print(line["model"], line["engine"], line["written"], line["odd"], flush=True)
    right = [line for line in lines if " - " not in line["engine"]]
    wrong = [line for line in lines if " - " in line["engine"]]
    print(table(right))
    print(f"{len(wrong)} engines with a mistake, of which an answer finds none: {sum(bool(line['odd']) for line in wrong)}")


def _model(there: Path) -> "Model":
    from planted import Faulty
    from right_engines import Model

    graph = RecordedGraph.from_json(json.loads((there / "graph.json").read_text()))
    path = there / "model.gguf"
    tokens = tuple(json.loads((there / "tokens.json").read_text()))
    return Model(there.name, path, Faulty(path, graph), tokens, load(there / "ref.jsonl"))


def _judged(model: "Model", path: Path) -> Iterator[dict[str, Any]]:
    """The answers to one engine's dumps; `odd` are those that are not right."""
    from device_kinds import KINDS
    from kind import Kind
    from right_engines import judged

    name, _, mistake = path.stem.partition(" - ")
    arithmetic = KINDS[name]
    kind = Kind(arithmetic.compute, (), exact=arithmetic.exact, without=arithmetic.without)
    whole = _shown(load(path), arithmetic)
    for way in ways_of(model.name, path.stem)[: 1 if mistake else WAYS]:
        began = process_time()
        ours = way.of(whole, model.faulty.transformer.model.info.layers or 1, kind.compute)
        try:
            said = judged(model, ours, way, kind, explained=True)
        except ParityError as error:
            said = {"all": f"accused: refused, {error}"}
        wrong = {name: text for name, text in said.items() if name != "lint" and not text.startswith("accused")}
        odd = wrong if mistake else {name: text for name, text in said.items() if text != "right"}
        yield {
            "model": model.name, "engine": path.stem, "kind": name, "written": vars(way), "said": said, "odd": odd,
            "seconds": round(process_time() - began, 2),
        }  # fmt: skip


def _shown(whole: Dump, kind: "DeviceKind") -> Dump:
    from msgspec.structs import replace

    from checkpoints.points import parse

    points = {name: rows for name, rows in whole.points.items() if parse(name).kind not in kind.without}
    return replace(whole, points=points)


def main() -> None:
    """One of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("make", "compute", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="where `compute` leaves its archives, else FOLDER")
    parser.add_argument("--only", default="", help="a part of an engine's name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of processor time, for `judge`")
    options = parser.parse_args()
    if options.part == "make":
        make(options.folder)
    elif options.part == "compute":
        compute(options.folder, options.out or options.folder, options.only)
    else:
        judge(options.folder, options.only, options.seconds)


if __name__ == "__main__":
    main()
