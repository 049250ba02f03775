"""Lint calls right dumps clean and names each fault of a capture by its rule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli
from numpy.typing import NDArray

from checkpoints.finding import ERROR
from checkpoints.jsonl import Writer
from checkpoints.reader import read
from checkpoints.record import Dump, End, Header, Rows, Token
from engine.backend import choose
from engine.gguf_model import GgufModel
from engine.transformer import Transformer
from parity.lint import lint
from parity.lint_rules.generated import REPEATS, SAME_TOKEN, cycle
from parity.lint_rules.model_facts import ModelFacts, open_model
from parity.lint_rules.table import RULES
from parity.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob

PROMPT = (2047, 410, 1200, 88, 911, 410, 5, 6)


@pytest.fixture(scope="module")
def transformer(stories: Path) -> Transformer:
    return Transformer(GgufModel(stories), choose("numpy"))


@pytest.fixture(scope="module")
def facts(stories: Path) -> ModelFacts:
    return open_model(stories)


@pytest.fixture(scope="module")
def right(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """A right dump: every point, 24 leading values, the prompt and three tokens that were chosen greedily."""
    out = tmp_path_factory.mktemp("right") / "ours.jsonl"
    chosen: list[int] = []
    sequence, tokens = transformer.start(), list(PROMPT)
    for _ in range(3):
        tokens = [int(transformer.forward(tokens, sequence).argmax())]
        chosen += tokens
    dump(transformer, OursJob(out, PROMPT, points="all", slice_size=24, generated=tuple(chosen)))
    return read(out)


@pytest.fixture(scope="module")
def whole(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """A right dump of whole rows."""
    out = tmp_path_factory.mktemp("whole") / "ours.jsonl"
    points = "embd,blk.3.{kq_soft_max,q,l_out},blk.23.l_out,output_norm,logits"
    dump(transformer, OursJob(out, PROMPT, points=points, slice_size=1 << 20))
    return read(out)


def changed(source: Dump, point: str, **columns: Any) -> Dump:
    return replace(source, points={**source.points, point: replace(source.points[point], **columns)})


def valued(source: Dump, point: str, change: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Dump:
    """The dump with other values at one point, without the statistics that would tell of them too."""
    values = change(source.points[point].values.copy()).astype(np.float32)
    return changed(source, point, values=values, stats={}, sketch=None)


def copied(source: Dump, to: str, of: str) -> Dump:
    return replace(source, points={**source.points, to: replace(source.points[of], point=to)})


def swapped_buffers(source: Dump) -> Dump:
    """Two buffers that swap each layer, read at the end of the pass: every odd layer's output is the last layer's."""
    for name in ("embd", "blk.5.l_out", "blk.1.l_out"):
        source = copied(source, name, "blk.23.l_out")
    return source


def stale(source: Dump) -> Dump:
    rows = source.points["blk.7.l_out"]
    return replace(
        source,
        points={
            **source.points,
            "blk.7.l_out": replace(rows.take([0, 1, 2, 2, 4, 5, 6, 7, 7, 9, 10]), token_idx=rows.token_idx),
        },
    )


def with_value(value: float, at: int = 3) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    def change(values: NDArray[np.float32]) -> NDArray[Any]:
        values[:, at] = value
        return values

    return change


def device_memory(values: NDArray[np.float32]) -> NDArray[Any]:
    values[:, ::3], values[:, 1::5] = 0.0, 1.5e18
    return values


def some_zeros(values: NDArray[np.float32]) -> NDArray[Any]:
    values[:, 10:20] = 0.0
    return values


def as_f16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(values).astype(np.float16).view(np.uint16)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def bf16_of(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


MISREAD: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "F16 as BF16": lambda x: bf16_of(as_f16(x)),
    "BF16 as F16": lambda x: bf16_bits(x).view(np.float16),
    "pairs of F16 as F32": lambda x: np.repeat(as_f16(x), 2, axis=1)[:, : 2 * x.shape[1]].copy().view(np.float32),
    "pairs of BF16 as F32": lambda x: np.stack([bf16_bits(x), bf16_bits(x[:, ::-1])], 2).reshape(len(x), -1).view(np.float32),
    "F32 as BF16": lambda x: bf16_of(np.ascontiguousarray(x[:, :12]).view(np.uint16)),
    "F32 as F16": lambda x: np.ascontiguousarray(x[:, :12]).view(np.float16),
}


def token_run(ids: list[int]) -> tuple[Token, ...]:
    return tuple(Token(i, number, f" {number}") for i, number in enumerate(ids, 8))


def in_header(source: Dump, **fields: Any) -> Dump:
    assert source.header is not None
    return replace(source, header=replace(source.header, **fields))


def shuffled(source: Dump) -> Dump:
    rows = source.points["embd"]
    return replace(source, points={**source.points, "embd": rows.take([1, 0, *range(2, len(rows))])})


def fewer_values(source: Dump) -> Dump:
    rows = source.points["blk.2.l_out"]
    return changed(source, "blk.2.l_out", values=rows.values[:, :10], counts=np.full(len(rows), 10))


def ramp(values: NDArray[np.float32]) -> NDArray[Any]:
    return np.arange(values.shape[1])[None, :] * 0.25 + np.zeros_like(values)


def integers(values: NDArray[np.float32]) -> NDArray[Any]:
    return np.arange(1, 25, dtype=np.int32)[None, :].repeat(len(values), 0).view(np.float32)


def other_statistic(source: Dump, point: str, name: str, of: str, factor: float) -> Dump:
    stats = source.points[point].stats
    return changed(source, point, stats={**stats, name: source.points[of].stats[name] * factor})


def lacking(source: Dump, point: str, position: int) -> Dump:
    rows = source.points[point]
    return replace(source, points={**source.points, point: rows.take(rows.token_idx != position)})


# rule -> how a capture comes to break it; each is made of a real run.
FAULTS: dict[str, Callable[[Dump], Dump]] = {
    "same-vector": swapped_buffers,
    "stale-position": stale,
    "idle-layer": lambda d: copied(d, "blk.9.l_out", "blk.8.l_out"),
    "impossible-size": lambda d: valued(d, "blk.5.l_out", device_memory),
    "non-finite": lambda d: valued(d, "blk.5.l_out", with_value(np.nan)),
    "exact-zeros": lambda d: valued(d, "blk.5.l_out", some_zeros),
    "garbage-logits": lambda d: valued(d, "logits", with_value(40000.0)),
    "flat-row": lambda d: valued(d, "blk.4.attn_out", ramp),
    "denormals": lambda d: valued(d, "blk.4.ffn_up", integers),
    "wrong-dtype": lambda d: valued(d, "blk.4.l_out", MISREAD["F16 as BF16"]),
    "value-count": fewer_values,
    "shape": lambda d: changed(d, "blk.6.l_out", shapes=((77,),) * len(d.points["blk.6.l_out"])),
    "missing-positions": lambda d: lacking(d, "blk.6.q", 3),
    "doubled": lambda d: changed(d, "embd", token_idx=np.zeros(11, np.int64), step=np.zeros(11, np.int64)),
    "out-of-order": shuffled,
    "cut-short": lambda d: replace(d, end=None),
    "statistics": lambda d: other_statistic(d, "blk.6.l_out", "l2", "blk.7.q", 0.01),
    "attention-rows": lambda d: other_statistic(d, "blk.6.kq_soft_max", "sum", "blk.6.kq_soft_max", 0.9),
    "captured-late": lambda d: copied(d, "blk.2.l_out", "blk.23.l_out"),
    "embedding-row": lambda d: in_header(d, tokens=(2047, 410, 1200, 88, 912, 410, 5, 6)),
    "hparams": lambda d: in_header(d, hparams={"eps": 1e-5}),
    "not-argmax": lambda d: replace(d, tokens=(replace(d.tokens[0], id=3), *d.tokens[1:])),
    "repetition": lambda d: replace(d, tokens=token_run([7] * SAME_TOKEN)),
}  # fmt: skip


def test_a_right_dump_has_no_finding(right: Dump, whole: Dump, facts: ModelFacts) -> None:
    """Every point of a right run, prefill and decode, sliced and whole, is clean, with the model file and without."""
    for source in (right, whole):
        assert lint(source).findings == ()
        assert lint(source, facts).findings == ()


def test_every_rule_has_a_fault_of_its_own() -> None:
    """A rule without a fixture here is a rule that nobody saw work."""
    assert set(FAULTS) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_by_its_rule(name: str, right: Dump, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault planted in a real dump is found by its rule and by that alone: the rule is silent on the right dump."""
    monkeypatch.setattr("parity.lint.RULES", tuple(rule for rule in RULES if rule.name == name))
    found = lint(FAULTS[name](right), facts).findings
    assert {finding.rule for finding in found} == {name}
    assert all(finding.evidence and finding.cause and finding.advice for finding in found)
    assert lint(right, facts).findings == ()


def test_swapped_buffers_are_told_from_layers_that_do_nothing(right: Dump, facts: ModelFacts) -> None:
    """With the model: "these are blk.23.l_out" where the capture came late; not so where the values are the true embedding."""
    late = [f.evidence for f in lint(swapped_buffers(right), facts).findings if f.rule == "captured-late"]
    assert late
    assert all("these are blk.23.l_out" in said for said in late)
    idle = right
    for layer in range(24):
        idle = copied(idle, f"blk.{layer}.l_out", "embd")
    weight = facts.output_norm()
    assert weight is not None
    rows = right.points["embd"]
    normed = rows.values * weight[None, :24] / np.sqrt(np.mean(rows.values**2, axis=1, keepdims=True))
    idle = changed(idle, "output_norm", values=normed.astype(np.float32), stats={}, sketch=None)
    rules = {f.rule for f in lint(idle, facts).findings}
    assert "captured-late" not in rules
    assert "same-vector" in rules


@pytest.mark.parametrize("kind", MISREAD)
def test_bits_read_as_another_type_are_recognised(kind: str, right: Dump) -> None:
    """Real activations whose bits are read as another 16- or 32-bit type are called by both types' names."""
    source = right.points["blk.4.l_out"]
    values = MISREAD[kind](source.values).astype(np.float32)
    rows = replace(source, values=values, counts=np.full(len(values), values.shape[1]), stats={}, sketch=None)
    found = [f.evidence for f in lint(replace(right, points={"blk.4.l_out": rows})).findings if f.rule == "wrong-dtype"]
    held, read_as = kind.removeprefix("pairs of ").split(" as ")
    assert len(found) == 1
    assert held in found[0]
    assert read_as in found[0]


def test_right_values_rounded_to_half_precision_are_not_called_misread(right: Dump) -> None:
    """Activations of an F16 or BF16 engine, printed exactly, are clean."""
    for convert in (lambda x: x.astype(np.float16), lambda x: bf16_of(bf16_bits(x))):
        points = {
            name: replace(rows, values=np.asarray(convert(rows.values), dtype=np.float32), stats={}, sketch=None)
            for name, rows in right.points.items()
        }
        assert lint(replace(right, points=points)).findings == ()


def test_a_prompt_of_one_repeated_token_is_clean(transformer: Transformer, facts: ModelFacts, tmp_path: Path) -> None:
    """Where every token is the same, equal vectors at successive positions are what a right engine computes."""
    out = tmp_path / "same.jsonl"
    dump(transformer, OursJob(out, (410,) * 6, points="all"))
    assert lint(read(out), facts).findings == ()


def test_positions_that_were_asked_for_are_not_missing(transformer: Transformer, tmp_path: Path) -> None:
    """`--positions 0,3,7` and `last` leave gaps in all points alike: no finding."""
    for positions in ((0, 3, 7), "last"):
        out = tmp_path / "some.jsonl"
        dump(transformer, OursJob(out, PROMPT, positions=positions))
        assert lint(read(out)).findings == ()


@pytest.mark.parametrize("kind", ["Q4_0", "BF16"])
def test_quantised_models_of_llama_cpp_are_clean(
    kind: str, quantized: Callable[[str], Path], reference: Reference, tmp_path: Path
) -> None:
    """llama.cpp's own dumps of every node, in the file's own types, with generated tokens, have no finding."""
    model, out = quantized(kind), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model=model, out=out, tokens=PROMPT, mode="native", points="all", generate=2, threads=1))
    report = lint(read(out), model)
    assert report.findings == ()


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([1, 2, 3] + [9] * SAME_TOKEN, (3, 1, SAME_TOKEN)),
        ([1, 2, 3] + [9] * (SAME_TOKEN - 1), None),
        ([5, 1, 2, 3, 4, 5, 6] * REPEATS, (0, 7, 28)),
        ([5, 1, 2, 3, 4, 5, 6] * (REPEATS - 1), None),
        ([1, 2] * 11, None),
        ([1, 2] * 12, (0, 2, 24)),
    ],
)
def test_repetition_has_stated_bounds(ids: list[int], found: tuple[int, int, int] | None) -> None:
    """A repeated token or cycle is reported from the bound on, with start, period and length, and not before."""
    assert cycle(ids) == found


def test_a_bare_engine_that_prints_no_positions_is_told_so(tmp_path: Path) -> None:
    """Lines without token_idx all stand at position 0 and contradict each other: an error, with what to print."""
    path = tmp_path / "bare.jsonl"
    rng = np.random.default_rng(1)
    lines = [f'{{"checkpoint":"layer_5","values":{list(map(float, rng.normal(size=10).round(4)))}}}' for _ in range(4)]
    path.write_text("\n".join(lines))
    report = lint(read(path))
    assert not report.usable
    assert [f.rule for f in report.findings] == ["doubled"]
    assert "token's position" in report.findings[0].advice


def test_warnings_leave_a_dump_usable(right: Dump) -> None:
    """NaN and idle layers may be the engine's own: a comparison is the judge, and lint says so."""
    for name in ("non-finite", "idle-layer", "cut-short", "repetition"):
        report = lint(FAULTS[name](right))
        assert report.findings
        assert report.usable
        assert all(finding.severity != ERROR for finding in report.findings)


def test_an_end_that_counts_more_records_than_there_are(right: Dump, tmp_path: Path) -> None:
    """A dump whose end record counts other lines, and one torn in its last line, are cut short."""
    assert right.end is not None
    report = lint(replace(right, end=End(right.end.checkpoints + 4)))
    assert [f.rule for f in report.findings] == ["cut-short"]
    path = tmp_path / "torn.jsonl"
    with Writer(path, Header("engine", tokens=PROMPT)) as writer:
        rows: Rows = right.points["blk.5.l_out"]
        writer.rows(rows)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 200])
    assert "last line is cut short" in lint(read(path)).findings[0].evidence


def test_a_diff_refuses_a_dump_that_lint_calls_unusable(right: Dump, parity: Cli, tmp_path: Path) -> None:
    """Swapped buffers are exit 2, naming the side and the rule; --despite-lint compares, and finds the divergence they fake."""
    for name, source in (("right", right), ("broken", swapped_buffers(right))):
        with Writer(tmp_path / f"{name}.jsonl", source.header) as writer:
            for rows in source.points.values():
                writer.rows(rows)
    refused = parity("diff", "broken.jsonl", "right.jsonl")
    assert refused.code == 2
    assert "ours (broken.jsonl) is not to be believed: same-vector" in refused.err
    assert refused.err.count("\n") == 1
    assert "the reference (broken.jsonl)" in parity("diff", "right.jsonl", "broken.jsonl").err
    code, answer = parity.json("diff", "broken.jsonl", "right.jsonl", "--despite-lint")
    assert code == 1
    assert answer["first_divergence"]["checkpoint"] == "embd"
    assert parity("diff", "right.jsonl", "right.jsonl").code == 0


def test_the_command_answers_people_and_machines(right: Dump, parity: Cli, tmp_path: Path) -> None:
    """Exit 1 with findings and 0 without; JSON has the contract's keys."""
    for name, source in (("right", right), ("broken", swapped_buffers(right))):
        with Writer(tmp_path / f"{name}.jsonl", source.header) as writer:
            for rows in source.points.values():
                writer.rows(rows)
    assert parity("lint", "right.jsonl").code == 0
    told = parity("lint", "broken.jsonl")
    assert told.code == 1
    assert "unusable: a diff of this dump would blame a right engine" in told.out
    code, answer = parity.json("lint", "broken.jsonl")
    assert code == 1
    assert answer["usable"] is False
    assert set(answer["findings"][0]) >= {"rule", "severity", "checkpoint", "token_idx", "evidence", "advice"}
