"""Does lint find anything in right dumps? Every weight type, prompt, set of points and length, both sides, with and without the model.

Run as `python benchmarks/lint.py [--quick] [--only NAME]` (models whose name holds NAME). Every finding is a false one and
printed as it is met, repetition past its bounds excepted; the table comes last. The stories model is tried in each type that llama.cpp
makes, random models in several shapes; all points with every prompt in one type.
"""

import tempfile
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import process_time

from checkpoints.answers.lint import Finding
from checkpoints.reading.reader import read
from engine.backend import choose
from engine.synth import shape_like, synthesize
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.lint.lint import lint
from parity.lint.model_facts import ModelFacts
from parity.models import embedded as default_model
from parity.run.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob

TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
WIDE_TYPE = "Q8_0"  # tried with all points on every prompt
SHAPES: tuple[tuple[str, dict[str, object]], ...] = (
    ("tiny", {"layers": 1}),
    ("tiny", {"layers": 5, "tied": True}),
    ("tiny", {"heads": 7, "kv_heads": 1, "width": 224}),
    ("tiny-llama", {"layers": 5, "heads": 4, "kv_heads": 2}),
    ("tiny-llama", {"tied": True, "head_size": 32, "kv_heads": 1}),
    ("tiny-llama", {"rope_factors": True, "rope_base": 500000.0}),
)
TEXTS = {
    "a story": "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog.",
    "unicode": "Zoë said “naïve café” – 日本語 🦊🦊 привет \u0301\u200b!\n\ttabs  and   spaces",
    "repeating": "the cat sat on the mat, the cat sat on the mat, the cat sat on the mat, the cat sat on the mat, the cat",
    "one word": "no no no no no no no no no no no no no no no no",
}
LENGTHS = {1: 16, 2: 0, 33: 16, 500: 8}  # tokens of a prompt: how many are generated after it
LONG = ("a story", "repeating")  # prompts after which 64 are


@dataclass(frozen=True)
class Case:
    """One right run of one model."""

    model: str
    prompt: str
    tokens: tuple[int, ...]
    points: str
    generate: int


def models(folder: Path, reference: Reference, quick: bool, only: str) -> Iterator[tuple[str, Path, bool]]:
    """Every model by name, and whether it is tried with everything."""
    stories = default_model.path()
    for kind in ("Q8_0", "Q4_0") if quick else TYPES:
        path = folder / f"stories-{kind}.gguf"
        if only in f"stories {kind}":
            yield f"stories {kind}", stories if kind == "Q8_0" else reference.quantize(stories, kind, path), kind == WIDE_TYPE
            path.unlink(missing_ok=True)
    for like, shape in SHAPES[:1] if quick else SHAPES:
        name, path = f"{like} {' '.join(f'{key}={value}' for key, value in shape.items())}", folder / f"{like}.gguf"
        if only in name:
            synthesize(path, shape_like(like, **shape), weight_type="f16", tokenizer=stories)
            yield name, path, False


def cases(name: str, path: Path, wide: bool, reference: Reference, quick: bool) -> Iterator[Case]:
    """What one model is run on. A dump with 64 generated tokens holds the one with none."""
    story = reference.tokenize(path, " ".join([TEXTS["a story"]] * 24)).ids
    prompts = {f"{length} tokens": tuple(story[:length]) for length in LENGTHS}
    prompts |= {text: tuple(reference.tokenize(path, TEXTS[text]).ids) for text in TEXTS}
    for prompt, tokens in prompts.items():
        if quick and len(tokens) > 40:
            continue
        yield Case(name, prompt, tokens, "default", LENGTHS.get(len(tokens), 64 if prompt in LONG and not quick else 16))
        if (wide and len(tokens) < 500) or prompt == "a story":
            yield Case(name, prompt, tokens, "all", 16)
    if wide and not quick:
        yield Case(name, "500 tokens", tuple(story[:500]), "blk.{0,1,22,23}.*,embd,output_norm,logits", 0)


def findings(
    case: Case, path: Path, folder: Path, reference: Reference, transformer: Transformer
) -> Iterator[tuple[str, Finding]]:
    """What lint finds on either side, with the model and without."""
    theirs, ours = folder / "ref.jsonl", folder / "ours.jsonl"
    job = DumpJob(path, theirs, case.tokens, mode="native", points=case.points, generate=case.generate)
    generated = reference.dump(job).generated
    dump(transformer, OursJob(ours, case.tokens, points=case.points, generated=generated))
    for side in (theirs, ours):
        recorded = read(side)
        for facts in (None, ModelFacts(transformer.model)):
            for finding in lint(recorded, facts).findings:
                yield f"{side.stem}{', with the model' if facts else ''}", finding


def sweep(quick: bool, only: str) -> Counter[tuple[str, str]]:
    """Dumps and findings, counted by (model, "dumps" or the rule)."""
    counted: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name, Reference(threads=1) as reference:
        folder = Path(name)
        for model, path, wide in models(folder, reference, quick, only):
            transformer = Transformer(GgufModel(path), choose("numpy"))
            for case in cases(model, path, wide, reference, quick):
                counted[model, "dumps"] += 2
                for side, finding in findings(case, path, folder, reference, transformer):
                    counted[model, finding.rule] += 1
                    print(f"{case.model}, {case.prompt}, {case.points}, +{case.generate}, {side}: ", end="")
                    print(f"{finding.rule}: {finding.evidence}", flush=True)
            print(f"{model}: {counted[model, 'dumps']} dumps", flush=True)
    return counted


def main() -> None:
    """Sweep, then the table."""
    parser = ArgumentParser(description="Lint on right dumps.")
    parser.add_argument("--quick", action="store_true", help="a few minutes' sample")
    parser.add_argument("--only", default="", help="models whose name holds this")
    asked = parser.parse_args()
    began = process_time()
    counted = sweep(asked.quick, asked.only)
    rules = sorted({what for _, what in counted} - {"dumps"})
    print(f"\n{'model':<48} {'dumps':>6} {'repetition':>10} {'others':>6}")
    for model in dict.fromkeys(model for model, _ in counted):
        others = sum(counted[model, rule] for rule in rules if rule != "repetition")
        print(f"{model:<48} {counted[model, 'dumps']:>6} {counted[model, 'repetition']:>10} {others:>6}")
    dumps = sum(count for (_, what), count in counted.items() if what == "dumps")
    print(f"{dumps} dumps, each with the model and without; {process_time() - began:.0f} s of CPU time besides llama.cpp's")


if __name__ == "__main__":
    main()
