"""Logs of PyTorch's DebugMode: two of them are compared, and say nothing of what an operation reads.

Those in tests/logs were printed by torch 2.13.
"""

from pathlib import Path

import pytest

from checkpoints.formats import load
from parity.diff.compare import compare

LOGS = Path(__file__).parent / "logs"


def test_two_debug_mode_logs_are_compared() -> None:
    """Hashes of two runs agree with themselves; the operation whose result is wrong is the first divergence."""
    right, wrong = load(LOGS / "debug-mode.log"), load(LOGS / "debug-mode-wrong.log")
    assert compare(load(LOGS / "debug-mode.log"), right).verdict == "parity"
    first = compare(wrong, right).first_divergence
    assert first is not None
    assert first.checkpoint.startswith("Sequential.2.aten.")


def test_a_debug_mode_log_says_nothing_of_what_an_operation_reads(tmp_path: Path) -> None:
    """A right view of a weight after a wrong product acquits nothing: the product is the first divergence, and its inputs are unknown."""
    lines = (
        "    [nn.Mod] M",
        "      [nn.Mod] M.up",
        "        aten::t(t: f32[4, 8])  ->  t: f32[8, 4]  # {{'hash': 3.5}}",
        "        aten::mm(t: f32[2, 8], t: f32[8, 4])  ->  t: f32[2, 4]  # {{'hash': {product}}}",
        "      [nn.Mod] M.down",
        "        aten::t(t: f32[8, 4])  ->  t: f32[4, 8]  # {{'hash': 7.25}}",
        "        aten::mm(t: f32[2, 4], t: f32[4, 8])  ->  t: f32[2, 8]  # {{'hash': {last}}}",
        "      [nn.Mod] M.head",
        "        aten::t(t: f32[8, 4])  ->  t: f32[4, 8]  # {{'hash': 9.5}}",
    )
    for name, product, last in (("right", 12.5, 21.0), ("wrong", 13.5, 22.0)):
        (tmp_path / name).write_text("\n".join(lines).format(product=product, last=last))
    compared = compare(load(tmp_path / "wrong"), load(tmp_path / "right"))
    assert compared.first_divergence is not None
    assert compared.first_divergence.checkpoint == "M.up.aten.mm#1"
    assert not compared.record_faults
    assert not compared.operation
    assert [origin.first.checkpoint for origin in compared.origins] == ["M.up.aten.mm#1"]


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        ("aten::mm(t$0: f32[2, 8], t$1: f32[8, 4])  ->  t$2: f32[2, 4]  # {{'hash': {}}}", "12.5", "12.75"),
        ("aten::mm(t: f32[2, 8], t: f32[8, 4])  # {{'input_hash': ((3.5, 7.25), {{}}), 'hash': {}}}", "12.5", "12.75"),
        (
            "aten::mm(t: f32[2, 8], t: f32[8, 4])  ->  t: f32[2, 4]  # {{'hash': {}}}",
            "9278655593168502784",
            "9278655593168502785",
        ),
        (
            "aten::topk(t$3: f32[3, 4], 2)  ->  ('t$10: f32[3, 2]', 't$11: i64[3, 2]')  # {{'hash': {}}}",
            "(5.5, 2.0)",
            "(5.5, 3.0)",
        ),
        ("aten::mm(t: f32[2, 8], t: f32[8, 4])  ->  t: f32[2, 4]  # {{'hash': {}}}", "(12.5, 16414091547508736)", "(12.75, 1)"),
    ],
    ids=["ids", "without outputs", "bits", "several results", "several hashes"],
)
def test_every_way_of_debug_mode_is_compared(line: str, right: str, wrong: str, tmp_path: Path) -> None:
    """Numbered tensors, operations without their output, hashes of bits of which one differs, several hashes: as torch 2.13 prints."""
    for name, value in (("right", right), ("again", right), ("wrong", wrong)):
        (tmp_path / name).write_text(f"    {line.format(value)}\n" * 2)
    assert compare(load(tmp_path / "again"), load(tmp_path / "right")).verdict == "parity"
    first = compare(load(tmp_path / "wrong"), load(tmp_path / "right")).first_divergence
    assert first is not None
    assert first.checkpoint.startswith("aten.")


def test_norms_are_compared_where_bits_stand_beside_them(tmp_path: Path) -> None:
    """Rounding changes every bit of a hash and little of a norm: of both the norm is compared."""
    line = "    aten::mm(t: f32[2, 8], t: f32[8, 4])  ->  t: f32[2, 4]  # {{'hash': {}}}\n"
    (tmp_path / "a").write_text(line.format("(12.376840725541115, 60591607073734656)"))
    (tmp_path / "b").write_text(line.format("(12.376840725541116, 9278655593168502784)"))
    assert compare(load(tmp_path / "a"), load(tmp_path / "b")).verdict == "parity"
