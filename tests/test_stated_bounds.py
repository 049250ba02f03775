"""Where answers stop: how many values, layers, records and choices are looked at, and how near two numbers must be."""

from pathlib import Path

import numpy as np
import pytest
from dumps import DEFAULT, dump, noisy, random, spoiled
from msgspec.structs import replace

from checkpoints.record import Dump
from engine.ignored import ignored
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import compare, comparison
from parity.lint.lint import lint
from reference.client import Reference

EPSILON = "qwen2.attention.layer_norm_rms_epsilon"


@pytest.mark.parametrize(("factor", "named"), [(1 + 6e-6, False), (1 - 6e-6, False), (1 + 2e-5, True), (1 - 2e-5, True)])
def test_a_number_of_the_file_is_read_if_it_is_the_graphs_as_float32(
    reference: Reference, stories: Path, factor: float, named: bool
) -> None:
    """ε that differs from the graph's by float32's rounding is the same number; by twice a hundred-thousandth it is another one."""
    metadata = GgufModel(stories).metadata
    assert bool(ignored(reference.graph(stories), {**metadata, EPSILON: metadata[EPSILON] * factor})) is named


def test_positions_are_aligned_by_64_records_spread_over_the_dump() -> None:
    """Of 127 records every second one is looked at: a dump whose other positions are all wrong is placed all the same."""
    positions = 127
    ref = random(positions=positions)
    ours = dump(spoiled(noisy(ref), DEFAULT, [*range(1, positions, 2), 0, 2], size=3.0), path="ours.jsonl", header=None)
    moved = replace(ours, points={name: replace(rows, token_idx=rows.token_idx + 5) for name, rows in ours.points.items()})
    verdict = compare(moved, dump(ref))
    assert any("ours are moved by -5" in note for note in verdict.notes)


def repeating(steps: int, layers: int, *, everywhere: bool) -> Dump:
    """A dump whose decode steps are all the same at every point, or whose layers have one output in each of them."""
    names = ("embd", *(f"blk.{layer}.l_out" for layer in range(layers)))
    arrays = random(names, positions=5 + steps)
    for name in names:
        if everywhere:
            arrays[name][5:] = arrays[name][5]
        elif name != "embd":
            arrays[name][5:] = arrays[names[1]][5:]
    return dump(arrays, prefill=5)


@pytest.mark.parametrize(
    ("steps", "layers", "everywhere", "named"),
    [(2, 4, True, False), (3, 4, True, True), (4, 2, False, False), (4, 3, False, True)],
)
def test_a_stale_graph_shows_in_three_steps_or_three_layers(steps: int, layers: int, everywhere: bool, named: bool) -> None:
    """Two equal decode steps, or two layers with one output, may be chance; three are reported as captured outside of the graph."""
    report = lint(repeating(steps, layers, everywhere=everywhere))
    assert ("graph-replay" in [finding.rule for finding in report.findings]) is named


@pytest.mark.parametrize(("last", "wanted"), [(16, "blk.{1..16}.*"), (17, "blk.{1..17}.{kqv_out,ffn_inp,l_out}")])
def test_sixteen_layers_are_recorded_whole_and_more_by_their_outputs(last: int, wanted: str) -> None:
    """The next run records every point of up to 16 layers; of more, three points a layer."""
    names = ("embd", "blk.0.l_out", f"blk.{last}.l_out", "logits")
    ref = random(names)
    verdict = compare(dump(spoiled(noisy(ref), names[2:], slice(1, None))), dump(ref))
    assert verdict.next.endswith(wanted)


def test_a_report_draws_4096_values_of_a_row() -> None:
    """The picture of a longer row shows its leading values; the statistics beside it are the whole row's."""
    ref = {"embd": np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)}
    picture = comparison(dump(noisy(ref), slice_size=None), dump(ref, slice_size=None)).picture
    assert picture.ours is not None
    assert picture.ref is not None
    assert (len(picture.ours.values), len(picture.ref.values), picture.ref.n) == (4096, 4096, 5000)


@pytest.mark.parametrize(("exchanged", "share"), [((4, 5), 0.8), ((5, 6), 1.0)])
def test_the_first_five_choices_are_compared_as_a_set(exchanged: tuple[int, int], share: float) -> None:
    """The fifth choice for the sixth is four of five; the sixth for the seventh is no difference."""
    ref = random(("logits",), positions=1)
    order = np.argsort(-ref["logits"][0])
    ours = {"logits": ref["logits"].copy()}
    ours["logits"][0, order[list(exchanged)]] = ref["logits"][0, order[list(exchanged[::-1])]]
    choices = compare(dump(ours, slice_size=None), dump(ref, slice_size=None)).choices
    assert choices is not None
    assert (choices.k, choices.top_k) == (5, pytest.approx(share))
