"""How much a right engine may be off before lint speaks: just below each bound nothing is found, just above it the rule is named."""

import numpy as np
import pytest
from dumps import dump, random
from msgspec.structs import replace

from checkpoints.answers.lint import ERROR, WARNING
from checkpoints.dataflow import Computation, Dataflow
from checkpoints.record import Dump, Token
from parity.lint.lint import lint


def rules(source: Dump) -> list[str]:
    """The names of the rules that find something."""
    return [finding.rule for finding in lint(source).findings]


@pytest.mark.parametrize("statistic", ["l2", "sum", "max"])
@pytest.mark.parametrize(("off", "named"), [(5e-5, False), (3e-4, True)])
def test_statistics_agree_with_the_values_to_a_ten_thousandth(statistic: str, off: float, named: bool) -> None:
    """A statistic computed in float32 or printed with five digits is right; one that is off by 3e-4 is another row's."""
    right = dump(random(("embd", "blk.0.l_out")), slice_size=None)
    rows = right.points["blk.0.l_out"]
    sizes = {
        "l2": rows.stats["l2"],
        "sum": np.abs(rows.values).sum(axis=1, dtype=np.float64),
        "max": np.abs(rows.values).max(axis=1),
    }
    stats = {**rows.stats, statistic: rows.stats[statistic] - off * sizes[statistic]}
    assert ("statistics" in rules(replace(right, points={**right.points, "blk.0.l_out": replace(rows, stats=stats)}))) is named


@pytest.mark.parametrize(("excess", "named"), [(2**-8, False), (2**-6, True)])
def test_attention_sums_to_one_within_truncated_bfloat16(excess: float, named: bool) -> None:
    """Weights that each lost up to 2^-7 are attention; a head that sums to 1 + 2^-6 is not."""
    scores = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    causal = np.where(np.tril(np.ones((8, 8), bool)), np.exp(scores), 0)
    weights = (causal / causal.sum(axis=-1, keepdims=True) * (1 + excess)).astype(np.float32)
    assert ("attention-rows" in rules(dump({"blk.0.kq_soft_max": weights}, slice_size=None))) is named


@pytest.mark.parametrize(("deviations", "named"), [(50.0, False), (70.0, True)])
def test_a_logit_is_garbage_beyond_sixty_deviations(deviations: float, named: bool) -> None:
    """One logit of a row whose others have a deviation of 3: 150 away may be a model's, 210 away is garbage."""
    logits = random(("logits",), positions=4)["logits"] * 3
    for row in logits:
        middle = np.partition(row, len(row) // 2)[len(row) // 2]
        row[5] = middle + deviations * 1.4826 * np.partition(np.abs(row - middle), len(row) // 2)[len(row) // 2]
    assert ("garbage-logits" in rules(dump({"logits": logits}, slice_size=None))) is named


@pytest.mark.parametrize(("behind", "named"), [(0.4, False), (0.6, True)])
def test_a_chosen_id_may_be_half_a_logit_behind(behind: float, named: bool) -> None:
    """An engine that is led along another's choice ranks it second by little; what is further behind was not the first choice."""
    right = dump(random(("embd", "logits"), positions=4), prefill=4)
    chosen = replace(right, tokens=(Token(4, 7, " a", ((3, 5.0 + behind), (7, 5.0))),))
    assert ("not-argmax" in rules(chosen)) is named


@pytest.mark.parametrize(("layers", "listed"), [(6, 6), (7, 6), (12, 6)])
def test_five_findings_of_a_rule_are_listed_and_more_are_counted(layers: int, listed: int) -> None:
    """A sixth finding is listed if it is the last; of more, one line says how many and where."""
    names = [f"blk.{layer}.l_out" for layer in range(layers)]
    arrays = random(("embd", *names))
    for name in names:
        arrays[name][3, 2] = np.nan
    findings = [finding for finding in lint(dump(arrays)).findings if finding.rule == "non-finite"]
    assert len(findings) == listed
    rest = f"and {layers - 5} more like this, at blk."
    assert findings[-1].evidence.startswith(rest) is (layers > 6)


@pytest.mark.parametrize(
    ("number", "named"),
    [(np.finfo(np.float32).min, False), (-3.3895314e38, False), (-1e30, False), (-3.0e38, True), (1e30, True)],
)
def test_the_lowest_number_hides_a_logit(number: float, named: bool) -> None:
    """The lowest float32 or bfloat16 and minus a power of ten are what engines write for −∞, in values and statistics; another number of
    that size is garbage.
    """
    logits = random(("logits",), positions=4)["logits"]
    logits[:, 4:40] = number
    found = rules(dump({"logits": logits}, slice_size=16))
    assert ("impossible-size" in found, "statistics" in found) == (named, False)


@pytest.mark.parametrize(
    ("name", "named"), [("blk.0.q", True), ("blk.0.l_out", True), ("blk.0.mask", False), ("logits", False)]
)
def test_minus_a_power_of_ten_hides_no_activation(name: str, named: bool) -> None:
    """−1e30 stands for −∞ where something may be hidden: among logits, and in masks. In a vector it is a soft max that began there."""
    values = random((name,), positions=4)[name]
    values[2, 3] = -1e30
    assert ("impossible-size" in rules(dump({name: values}))) is named


@pytest.mark.parametrize(("number", "named"), [(-1e30, False), (-3e9, True)])
def test_logits_of_a_padded_vocabulary_are_no_garbage(number: float, named: bool) -> None:
    """Numbers that stand for −∞ behind the vocabulary are no logits far outside; others are, and are named by their place in the row."""
    logits = random(("logits",), positions=2)["logits"]
    logits[:, 3], logits[:, -2:] = -np.inf, number
    found = [f.evidence for f in lint(dump({"logits": logits}, slice_size=None)).findings if f.rule == "garbage-logits"]
    assert [f"[{logits.shape[1] - 2}] " in evidence for evidence in found] == [True] * named


@pytest.mark.parametrize(
    ("sizes", "severity"),
    [((1, 2e7, 2e13, 4e20), WARNING), ((1, 2e7, 1e6, 4e20), ERROR), ((1, 2, 3, 4e20), ERROR), ((1, 4e20, 4e20, 4e20), ERROR)],
)
def test_a_state_that_explodes_is_a_computed_value(sizes: tuple[float, ...], severity: str) -> None:
    """Sizes that rise from position to position through what no right engine has are a recurrence without decay, which a comparison names
    as it names any other fault; huge numbers that come at once, or in no order, are another memory's.
    """
    scan = random(("blk.0.ssm_scan",), positions=4)["blk.0.ssm_scan"]
    scan[:, 3] = sizes
    found = [finding.severity for finding in lint(dump({"blk.0.ssm_scan": scan})).findings if finding.rule == "impossible-size"]
    assert found == [severity]


@pytest.mark.parametrize(("later", "named"), [((3, 2, 1, 0), False), ((2, 1, 0, 0), True), ((1, 0, 0, 0), True)])
def test_a_mask_over_a_pass_hides_all_later_positions(later: tuple[int, ...], named: bool) -> None:
    """Two heads' scores of four positions with −∞ for each later one; another number of −∞ is an overflow, as at the first position."""
    scores = np.random.default_rng(0).standard_normal((4, 2, 4)).astype(np.float32)
    for row, number in zip(scores, later, strict=True):
        row[:, 4 - number :] = -np.inf
    source = dump({"blk.0.scores": scores.reshape(4, 8)}, slice_size=None)
    found = lint(source, dataflow=Dataflow({"blk.0.scores": Computation("ADD")})).findings
    assert ("non-finite" in {finding.rule for finding in found}) is named
