"""How far float32's own noise reaches in exact mode:  python benchmarks/noise.py [-n 20] [--tokens 512] [--truth]

Our engine and llama.cpp on the embedded model, every layer's output: prompts of random ids, where near-ties in attention,
which noise can tip, are far more frequent than in text, and this repository's own files, text unlike the model's training text.
With `--truth`: how far two right engines are from llama.cpp, in proportion to llama.cpp's own distance from the same steps in
float64 (what `parity.diff.tolerances.truth.MULTIPLE` comes from).
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cpu import environment
from msgspec.structs import replace

from checkpoints.points import EMBD, LOGITS, OUTPUT_NORM
from checkpoints.reading.reader import read
from engine import ops
from engine.backend import Array, choose
from engine.graph import Step
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.arbiter.arbiter import Arbiter
from parity.diff.compare import comparison
from parity.diff.limits import EXACT_FLOOR, JUMP
from parity.diff.measured.records import Records
from parity.diff.tolerances.truth import MULTIPLE, raised
from parity.models import embedded as default_model
from parity.run.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob

POINTS = f"{EMBD},blk.*.l_out,{OUTPUT_NORM},{LOGITS}"
_TEXTS = (
    "README.md",
    "docs/your-engine.md",
    "docs/isolate.md",
    "docs/explain.md",
    "parity/diff/compare.py",
    "engine/kernels/summary.cu",
)
BOS = 2047


def main() -> None:
    """Measure all prompts; print a line each and a table last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=20, help="prompts of random ids")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--points", default=POINTS)
    parser.add_argument("--truth", action="store_true", help="prompts of random ids only, held against float64")
    given = parser.parse_args()
    if given.truth:
        with Reference() as reference, tempfile.TemporaryDirectory() as name:
            for prompt in random_ids(given.n, given.tokens):
                against_truth(reference, Path(name), prompt, given.points)
        return
    rows = []
    with Reference() as reference, tempfile.TemporaryDirectory() as name:
        for kind, prompts in (("random ids", random_ids(given.n, given.tokens)), ("text", texts(reference, given.tokens))):
            measured = []
            for prompt in prompts:
                measured.append(Noise.of(compared(reference, Path(name), prompt, given.points)))
                print(kind, measured[-1].sentence, flush=True)
            rows.append((kind, measured))
    print(environment())
    print("\n| prompts | records | worst NMSE | of its limit | over the limit | of them jumps |\n|---|---|---|---|---|---|")
    for kind, measured in rows:
        worst = max(measured, key=lambda noise: noise.of_limit)
        sums = [sum(getattr(noise, name) for noise in measured) for name in ("records", "over", "jumps")]
        print(
            f"| {len(measured)} of {kind} | {sums[0]:,} | {worst.nmse:.1e} | {100 * worst.of_limit:.0f} % | {sums[1]} | {sums[2]} |"
        )


@dataclass(frozen=True)
class Noise:
    """One prompt: its worst record against the exact limit, how many records exceed it, and how many of these jump."""

    records: int
    nmse: float
    of_limit: float
    over: int
    jumps: int
    sentence: str

    @staticmethod
    def of(records: Records) -> "Noise":
        """The figures of compared records."""
        limits = [EXACT_FLOOR.logits if name == LOGITS else EXACT_FLOOR.operations for name in records.names]
        of_limit = records.measures.nmse / np.array(limits)[records.point]
        worst, over = int(of_limit.argmax()), of_limit > 1
        nmse, jump = float(records.measures.nmse[worst]), records.jump()
        where = f"{records.names[records.point[worst]]}, position {records.token_idx[worst]}"
        sentence = f"{nmse:.1e} at {where}, {jump[worst]:.1f} times the worst before it; {over.sum()} records over the limit"
        return Noise(len(records), nmse, float(of_limit[worst]), int(over.sum()), int((over & (jump > JUMP)).sum()), sentence)


def random_ids(count: int, length: int) -> Iterator[tuple[int, ...]]:
    """Seeded prompts of BOS and random ids."""
    for seed in range(count):
        draw = random.Random(seed)
        yield (BOS, *(draw.randrange(BOS) for _ in range(length - 1)))


def texts(reference: Reference, length: int) -> Iterator[tuple[int, ...]]:
    """The beginnings of some of this repository's files."""
    for name in _TEXTS:
        text = (Path(__file__).parent.parent / name).read_text(encoding="utf-8")
        yield reference.tokenize(default_model.path(), text).ids[:length]


def compared(reference: Reference, folder: Path, tokens: tuple[int, ...], points: str) -> Records:
    """Both sides of one prompt."""
    ours, ref = folder / "ours.jsonl", folder / "ref.jsonl"
    dump(Transformer(GgufModel(default_model.path()), choose("numpy")), OursJob(ours, tokens, points=points))
    reference.dump(DumpJob(default_model.path(), ref, tokens, points=points))
    return comparison(read(ours), read(ref)).records


def against_truth(reference: Reference, folder: Path, tokens: tuple[int, ...], points: str) -> None:
    """Print, for each of two right engines, its distance from llama.cpp in proportion to llama.cpp's distance from float64."""
    ref = folder / "ref.jsonl"
    reference.dump(DumpJob(default_model.path(), ref, tokens, points=points))
    transformer = Transformer(GgufModel(default_model.path()), choose("numpy"))
    distances = Arbiter.of(transformer, tokens).distances(read(ref).points)
    for name, steps in (("NumPy's products", transformer.steps), ("another order", in_another_order(transformer.steps))):
        transformer.steps = steps
        dump(transformer, OursJob(folder / "ours.jsonl", tokens, points=points))
        records = comparison(read(folder / "ours.jsonl"), read(ref)).records
        nmse, distance = records.measures.nmse, np.concatenate([distances[point] for point in records.names])
        none, fine = np.zeros(len(nmse)), np.zeros(len(nmse), dtype=np.bool_)
        keys = records.point, records.seq, records.token_idx
        worst = raised(none, none, distance, *keys, fine, rounding=np.inf) / MULTIPLE
        large = nmse > 1e-12
        print(
            f"{name}: worst {nmse.max():.1e} from llama.cpp, which is up to {distance.max():.1e} from the truth;"
            f" ratio to the position's worst: at most {(nmse[large] / worst[large]).max(initial=0):.0f},"
            f" to the record's own: {(nmse[large] / distance[large]).max(initial=0):.0f}",
            flush=True,
        )


def in_another_order(steps: Sequence[Step]) -> list[Step]:
    """The steps with products that are summed in another order than BLAS does."""

    def product(x: Array, weight: Array, bias: Array | None = None) -> Array:
        value = np.einsum("ti,oi->to", x[:, ::-1], weight[:, ::-1], optimize=False)
        return value if bias is None else value + bias

    return [replace(step, op=product) if step.op is ops.linear else step for step in steps]


if __name__ == "__main__":
    main()
