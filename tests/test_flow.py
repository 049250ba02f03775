"""The graph of a layer's dataflow: what is made from what, in rows, for any architecture."""

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints.reading.reader import read
from parity.diff.compare import comparison
from reference.client import Reference
from reference.jobs import DumpJob
from reports.flow import flows


@pytest.mark.parametrize("like", ["tiny", "tiny-llama"])
def test_a_layer_in_rows(like: str, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """Every edge goes down, queries meet keys at their product, the residual bypasses attention, and no nodes overlap."""
    out = tmp_path / "ref.jsonl"
    with Reference() as reference:
        reference.dump(DumpJob(synthetic(like, layers=2), out, (1, 17, 40), points="all"))
    dump = read(out)
    compared = comparison(dump, dump)
    drawn = flows(compared.verdict, compared.picture.grid.points, (dump,))
    graph = next(layer for layer in drawn["layers"] if layer["label"] == "layer 1")
    names = [node["name"] for node in graph["nodes"]]
    edges = {(names[a], names[b]) for a, b in graph["edges"]}
    assert {("blk.1.q_rope", "blk.1.kq"), ("blk.0.l_out", "blk.1.ffn_inp"), ("blk.1.ffn_inp", "blk.1.l_out")} <= edges
    assert all(graph["nodes"][a]["row"] < graph["nodes"][b]["row"] for a, b in graph["edges"])
    places = [(node["row"], node["column"]) for node in graph["nodes"]]
    assert len(set(places)) == len(places)
    assert all(node["status"] == "agrees" for node in graph["nodes"] if node["point"] is not None)
    assert names.index("blk.0.l_out") == 0


def test_few_points_without_a_header(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """With outputs of layers only the vocabulary's order is drawn, what was not recorded as such."""
    out = tmp_path / "ref.jsonl"
    with Reference() as reference:
        reference.dump(DumpJob(synthetic("tiny", layers=2), out, (1, 17), points="blk.*.l_out"))
    dump = read(out)
    compared = comparison(dump, dump)
    drawn = flows(compared.verdict, compared.picture.grid.points, ())
    assert [layer["label"] for layer in drawn["layers"]] == ["layer 0", "layer 1"]
    nodes = {node["name"]: node["point"] for node in drawn["layers"][1]["nodes"]}
    assert nodes["blk.1.l_out"] == 1
    assert nodes["blk.1.q"] is None
