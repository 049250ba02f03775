"""Ten hand-made faults in our engine: the comparator names the operation, the interval, and the points that find it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cli import Cli
from msgspec.structs import replace

from checkpoints.answers.diff import Verdict
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.backend import choose
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import compare
from parity.run.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob

PROMPT = "Once upon a time there was a little dog who liked to run"
LAYER = 7  # between two of the default layers, so that the default points leave an interval

# fault: the points where it starts, and the pattern of the default points when it is in layer 7 only
EXPECTED = {
    "rope-pairs": ({"q_rope", "k_rope"}, "from-position-1"),
    "rope-base": ({"q_rope", "k_rope"}, "from-position-1"),
    "no-qkv-bias": ({"q", "k", "v"}, "from-position-0"),
    "norm-epsilon": ({"attn_norm"}, "from-position-0"),
    "gqa-modulo": ({"kq"}, "from-position-0"),
    "no-causal-mask": ({"kq_soft_max"}, "from-position-0"),
    "gate-up-swapped": ({"ffn_gate", "ffn_up"}, "from-position-0"),
    "transposed": ({"attn_out"}, "from-position-0"),
    "no-final-norm": ({"output_norm"}, "operation"),
    "q4k-scale-min": ({"q", "k", "v"}, "from-position-0"),
}
# From position 0 on, the softmax over one key is 1: a fault in Q or K shows there only where Q or K are recorded.
# What is more than "this operation": what a mask lets through, whose numbers stand there, an operation that does nothing.
OPERATION_PATTERN = {"no-causal-mask": "causal-mask", "gate-up-swapped": "other-record", "no-final-norm": "no-op"}


class Lab:
    """Makes dumps of the stories model, right and wrong, and keeps the reference's."""

    def __init__(self, reference: Reference, quantized: Callable[[str], Path], folder: Path) -> None:
        self.reference = reference
        self.quantized = quantized
        self.folder = folder
        self._engines: dict[str, Transformer] = {}
        self._references: dict[tuple[str, str], Dump] = {}

    def engine(self, kind: str) -> Transformer:
        if kind not in self._engines:
            self._engines[kind] = Transformer(GgufModel(self.quantized(kind)), choose("numpy"))
        return self._engines[kind]

    def ours(self, kind: str, steps: Sequence[Step], points: str) -> Dump:
        engine = self.engine(kind)
        right, engine.steps = engine.steps, steps
        try:
            path = self.folder / "ours.jsonl"
            dump(engine, OursJob(path, self.tokens, points=points, prompt=PROMPT))
        finally:
            engine.steps = right
        return read(path)

    def ref(self, kind: str, points: str) -> Dump:
        if (kind, points) not in self._references:
            path = self.folder / f"ref-{len(self._references)}.jsonl"
            named = ",".join(self.engine(kind).points) if points == "all" else points
            self.reference.dump(DumpJob(self.quantized(kind), path, self.tokens, PROMPT, points=named))
            self._references[kind, points] = read(path)
        return self._references[kind, points]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.reference.tokenize(self.quantized("Q8_0"), PROMPT).ids

    def verdict(self, kind: str, steps: Sequence[Step], points: str) -> Verdict:
        return compare(self.ours(kind, steps, points), self.ref(kind, points))


@pytest.fixture(scope="module")
def lab(reference: Reference, quantized: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(reference, quantized, tmp_path_factory.mktemp("lab"))


def kind_of(fault: str) -> str:
    """Q4_K's scales and mins need a file that has some."""
    return "Q4_K_M" if fault == "q4k-scale-min" else "Q8_0"


def kinds(verdict: Verdict) -> set[str]:
    return {origin.first.checkpoint.split(".")[-1] for origin in verdict.origins}


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(EXPECTED))
def test_all_points_name_the_operation(lab: Lab, fault: str) -> None:
    """With every point recorded, the origins are the faulty operations of layer 0 and nothing else."""
    steps = plant(lab.engine(kind_of(fault)).steps, CATALOGUE[fault])
    verdict = lab.verdict(kind_of(fault), steps, "all")
    expected, _ = EXPECTED[fault]
    assert not verdict
    # llama.cpp keeps the value projection of the first layers in Q6_K in a Q4_K_M file.
    assert kinds(verdict) == (expected - {"v"} if fault == "q4k-scale-min" else expected)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.fresh
    assert verdict.first_divergence.layer in (0, None)
    assert verdict.operation.endswith("this operation is wrong")
    assert verdict.next == ""
    assert verdict.pattern is not None
    assert verdict.pattern.code == OPERATION_PATTERN.get(fault, "operation")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [name for name in EXPECTED if name != "no-final-norm"])
def test_default_points_name_the_interval_and_what_to_record_next(lab: Lab, fault: str) -> None:
    """With the fault in layer 7 only: 5 agrees, 10 differs, and the points to record next name the operation."""
    kind = kind_of(fault)
    # ε of one late layer moves its output by less than the limit: the residual stream is too large there. It is in all.
    layer = 0 if fault == "norm-epsilon" else LAYER
    steps = plant(lab.engine(kind).steps, CATALOGUE[fault], layers=None if layer == 0 else [layer])
    verdict = lab.verdict(kind, steps, "default")
    assert verdict.last_agreement is not None
    assert verdict.first_divergence is not None
    interval = ("embd", "blk.0.l_out") if layer == 0 else ("blk.5.l_out", "blk.10.l_out")
    assert (verdict.last_agreement.checkpoint, verdict.first_divergence.checkpoint) == interval
    expected, pattern = EXPECTED[fault]
    assert verdict.pattern is not None
    assert verdict.pattern.code == pattern
    narrowed = lab.verdict(kind, steps, verdict.next)
    while narrowed.next:  # each answer narrows the interval; the last names the operation
        assert narrowed.next != verdict.next
        verdict, narrowed = narrowed, lab.verdict(kind, steps, narrowed.next)
    assert {origin.first.checkpoint for origin in narrowed.origins} == {f"blk.{layer}.{name}" for name in expected}


def test_a_missing_causal_mask_has_a_pattern_of_its_own(lab: Lab) -> None:
    """In all layers: layer 0's output is wrong at every position but the last, which has nothing later to look at."""
    verdict = lab.verdict("Q8_0", plant(lab.engine("Q8_0").steps, CATALOGUE["no-causal-mask"]), "default")
    assert verdict.pattern is not None
    assert verdict.pattern.code == "causal-mask"


def test_a_missing_final_norm_is_named_by_the_default_points(lab: Lab) -> None:
    """All layers agree, output_norm does not: the operation is known without another run."""
    verdict = lab.verdict("Q8_0", plant(lab.engine("Q8_0").steps, CATALOGUE["no-final-norm"]), "default")
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "output_norm"
    assert "blk.23.l_out" in verdict.operation


def test_epsilon_is_found_though_the_text_would_be_the_same(lab: Lab) -> None:
    """ε 1e-5 for 1e-6 changes no greedy choice, and is a divergence all the same: that is what exact mode is for."""
    verdict = lab.verdict("Q8_0", plant(lab.engine("Q8_0").steps, CATALOGUE["norm-epsilon"], eps=1e-5), "default")
    assert not verdict
    assert verdict.choices is not None
    assert verdict.choices.agree == verdict.choices.known > 0


def test_two_origins_are_both_listed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another embedding row at position 9 and a fault in layer 10, seen at earlier positions: both are origins."""

    def other_row(ids, take):
        rows = take(ids).copy()
        rows[9] = take(ids[:1] * 0 + 77)[0]
        return rows

    steps = [replace(step, op=other_row) if step.makes == "embd" else step for step in lab.engine("Q8_0").steps]
    verdict = lab.verdict("Q8_0", plant(steps, CATALOGUE["gate-up-swapped"], layers=[10]), "default")
    assert [(origin.first.checkpoint, origin.first.token_idx) for origin in verdict.origins] == [
        ("embd", 9),
        ("blk.10.l_out", 0),
    ]
    assert verdict.origins[0].positions == (9,)


def test_two_swapped_buffers_are_a_fault_of_the_capture(lab: Lab) -> None:
    """Two buffers that swap each layer, captured late: the logits are right, so the records are wrong and the engine is not."""
    right = lab.ours("Q8_0", lab.engine("Q8_0").steps, "default")
    last = right.points["blk.23.l_out"]
    late = replace(
        right,
        points={name: replace(last, point=name) if name.endswith("l_out") else rows for name, rows in right.points.items()},
    )
    verdict = compare(late, lab.ref("Q8_0", "default"))
    assert verdict.first_divergence is None
    assert {fault.checkpoint for fault in verdict.record_faults} == {"blk.0.l_out", "blk.5.l_out", "blk.10.l_out"}


def test_diff_exits_1_and_shows_it(lab: Lab, parity: Cli) -> None:
    """`parity diff` of a faulty dump exits 1 and prints the place, both sides' values and what to record next."""
    steps = plant(lab.engine("Q8_0").steps, CATALOGUE["rope-pairs"], layers=[LAYER])
    ours, ref = lab.ours("Q8_0", steps, "default"), lab.ref("Q8_0", "default")
    ran = parity("diff", ours.path, ref.path)
    assert ran.code == 1
    for part in ("divergence at blk.10.l_out, position 1", "blk.5.l_out", "← first", "inherited", "--points"):
        assert part in ran.out
    code, answer = parity.json("diff", ours.path, ref.path)
    assert (code, answer["verdict"]) == (1, "divergence")
    assert len(answer["first_divergence"]["ours"]) == 16
