"""`parity score`: the figures of llama-perplexity over a text, held to their definitions on recorded logits."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from foreign import compile_engine

from checkpoints.reading.reader import read
from parity.score.measures import Tally, kl_of_top, kl_whole, largest, log_sum
from reference.client import DumpJob, Reference

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, she found a big red "
    "ball in the park and took it home to her mom. Her mom was happy and said, what a nice ball. They played all day."
)
CONTEXT = 16
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


def test_a_tally_is_its_definitions() -> None:
    """Perplexity with its standard error, and the change of probabilities, as their formulas over all positions say."""
    rng = np.random.default_rng(2)
    log_p, base = -rng.gamma(2.0, size=(2, 50))
    tally = Tally()
    for mine, other in zip(log_p, base, strict=True):
        tally.predicted(mine)
        tally.against(0.0, 0.0, other, range(5), range(5))
        tally.moved(mine, other)
    value, error = tally.perplexity
    assert value == pytest.approx(np.exp(-log_p.mean()))
    assert error == pytest.approx(np.exp(-log_p.mean()) * log_p.std(ddof=1) / np.sqrt(50))
    delta = np.exp(log_p) - np.exp(base)
    assert (tally.compared()["delta_p_mean"], tally.compared()["delta_p_rms"]) == (
        pytest.approx(delta.mean()),
        pytest.approx(np.sqrt((delta**2).mean())),
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of a few chunks."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def definitions(reference: Reference, model: Path, folder: Path, mode: str) -> list[tuple[np.ndarray, int]]:
    """(log-probabilities float64 [V], next id) of every scored position, from dumps of whole rows: perplexity.cpp in plain NumPy."""
    tokens = reference.tokenize(model, TEXT)
    scored = []
    for start in range(0, len(tokens.ids) - CONTEXT + 1, CONTEXT):
        ids = list(tokens.ids[start : start + CONTEXT])
        if tokens.add_bos:
            ids[0] = tokens.bos  # type: ignore[call-overload]
        out = folder / f"{mode}-{start}.jsonl"
        reference.dump(DumpJob(model, out, tuple(ids), mode=mode, points="logits", slice_size=None))
        rows = read(out).points["logits"]
        for position in range(CONTEXT // 2, CONTEXT - 1):
            x = rows.values[position].astype(np.float64)
            scored.append((x - x.max() - np.log(np.exp(x - x.max()).sum()), ids[position + 1]))
    return scored


@pytest.mark.slow
def test_the_figures_are_those_of_their_definitions(
    parity: Cli, reference: Reference, stories: Path, text: Path, tmp_path: Path
) -> None:
    """llama.cpp in the file's own types against itself in F32: perplexities, KL, first choices and Δp from recorded logits."""
    code, answer = parity.json("score", "--text", text, "--context", CONTEXT, "--side", "ref", "--mode", "native")
    assert code == 0
    ours, base = (definitions(reference, stories, tmp_path, mode) for mode in ("native", "exact"))
    assert answer["positions"] == len(ours) == answer["chunks"] * (CONTEXT - 1 - CONTEXT // 2)
    for name, rows in (("ours", ours), ("base", base)):
        assert answer["perplexity"][name] == pytest.approx(np.exp(-np.mean([p[token] for p, token in rows])), rel=1e-5)
    kl = np.array([np.sum(np.exp(p) * (p - q)) for (p, _), (q, _) in zip(base, ours, strict=True)])
    # Portions of a prompt are rounded in another order than the whole: 1e-3 of a KL of 1e-4.
    assert answer["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-2)
    assert answer["kl"]["max"] == pytest.approx(kl.max(), rel=1e-2)
    assert answer["kl"]["percentiles"]["90"] == pytest.approx(np.percentile(kl, 90), rel=1e-2)
    same = np.mean([p.argmax() == q.argmax() for (p, _), (q, _) in zip(base, ours, strict=True)])
    assert answer["same_top"] == pytest.approx(same)
    delta = np.array([np.exp(q[token]) - np.exp(p[token]) for (p, token), (q, _) in zip(base, ours, strict=True)])
    assert answer["delta_p"]["rms"] == pytest.approx(np.sqrt(np.mean(delta**2)), rel=1e-2)


@pytest.mark.slow
def test_a_base_file_is_a_lower_bound_that_is_nearly_exact(parity: Cli, text: Path) -> None:
    """256 logits a position and the sum of all: KL within 1 % of the whole rows', never above it, and perplexity the same."""
    words = ("score", "--text", text, "--context", CONTEXT)
    assert parity(*words, "--side", "ref", "--alone", "--save-base", "b.base").code == 0
    native = (*words, "--side", "ref", "--mode", "native")
    _, exact = parity.json(*native)
    _, kept = parity.json(*native, "--base", "b.base")
    assert kept["kl"]["exact"] is False
    assert 0.99 * exact["kl"]["mean"] <= kept["kl"]["mean"] <= exact["kl"]["mean"] * (1 + 1e-9)
    assert kept["perplexity"] == pytest.approx(exact["perplexity"])
    assert Path("b.base").stat().st_size < 3000 * exact["positions"]


def test_bounds_of_the_divergence() -> None:
    """For random rows the top entries' KL is a lower bound of the whole one, and equal where nothing is left out."""
    rng = np.random.default_rng(5)
    for size in (8, 300, 5000):
        base, ours = (rng.standard_normal(size).astype(np.float32) * 4 for _ in range(2))
        whole = kl_whole(base, ours)
        for kept in (4, 256, size):
            ids = largest(base, kept)
            lower, left = kl_of_top(ids, base[ids], log_sum(base), ours)
            assert lower <= whole + 1e-9
            if kept >= size:
                assert (lower, left) == (pytest.approx(whole), pytest.approx(0, abs=1e-9))
    assert largest(np.array([1, 3, 3, 2], dtype=np.float32), 3).tolist() == [1, 2, 3]


@pytest.mark.slow
def test_our_engine_is_llama_cpp_over_a_text(parity: Cli, text: Path) -> None:
    """KL of rounding only, every first choice the same; the Markdown block has the figures, the screen fits."""
    words = ("score", "--text", text, "--context", CONTEXT, "--chunks", "2")
    code, answer = parity.json(*words)
    assert (code, answer["same_top"], answer["chunks"]) == (0, 1.0, 2)
    assert answer["kl"]["max"] < 1e-8
    block = parity(*words, "--format", "markdown").out
    assert "| KL divergence | mean " in block
    assert all(len(line) <= 80 for line in parity(*words).out.splitlines())


@needs_gcc
@pytest.mark.slow
def test_a_foreign_engine_is_scored_and_its_worst_token_explained(parity: Cli, text: Path, tmp_path: Path) -> None:
    """Whole rows of logits of an engine in C: right, it is at rounding; wrong from layer 7 on, the worst token leads to the cause.

    Figures are printed even if the engine then fails at the worst token.
    """
    engine = compile_engine(tmp_path, "-DPARITY_SLICE=4096")
    words = ("score", "--text", text, "--context", CONTEXT, "--chunks", "1", "--exec")
    code, right = parity.json(*words, f"{engine} {{model}} {{tokens}} {{out}}")
    assert (code, right["same_top"], right["kl"]["max"] < 1e-8) == (0, 1.0, True)
    assert len(right["worst"]["before"]) == 60  # as much of the text before the worst token as a line has room for
    late = (*words, f"{engine} {{model}} {{tokens}} {{out}} late {{points}}", "--explain-worst")
    code, answer = parity.json(*late)
    assert (code, answer["explained"]["first_divergence"]["checkpoint"]) == (1, "blk.7.q_rope")
    assert [cause["fault"] for cause in answer["explained"]["explanation"]["causes"]] == ["rope-pairs"]
    block = parity(*late, "--format", "markdown").out
    assert "it first diverges at `blk.7.q_rope`, position 1; cause: `rope-pairs`." in block
    picky = ("--exec-shell", f"[ {{points}} = logits ] || exit 3; {engine} {{model}} {{tokens}} {{out}}")
    code, answer = parity.json(*words[:-1], *picky, "--explain-worst")
    assert (code, answer["same_top"], answer["explained"]["error"]["code"]) == (2, 1.0, "exec")
    block = parity(*words[:-1], *picky, "--explain-worst", "--format", "markdown").out
    assert "the sides could not be compared: [ failed with exit code 3" in block
    small = compile_engine(tmp_path)
    refused(parity(*words, f"{small} {{model}} {{tokens}} {{out}}"), "16 of 2,048 logits", "PARITY_SLICE")


@pytest.mark.slow
def test_what_it_refuses(parity: Cli, text: Path, tmp_path: Path) -> None:
    """Texts that are none, contexts that score nothing or are too long, two bases, and a base of another text."""
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "short.txt").write_text("Hi")
    (tmp_path / "other.base").write_bytes(b"\0" * 64)
    refused(parity("score", "--text", "nowhere.txt"), "cannot read nowhere.txt")
    refused(parity("score", "--text", "empty.txt"), "holds no text")
    refused(parity("score", "--text", "latin.txt"), "not UTF-8")
    refused(parity("score", "--text", "short.txt"), "fewer than one chunk")
    refused(parity("score", "--text", text, "--context", "2"), "is too small to score anything")
    refused(parity("score", "--text", text, "--context", "100000"), "trained for")
    refused(parity("score", "--text", text, "--context", CONTEXT, "--base", "other.base"), "is not a base file")
    refused(parity("score", "--text", text, "--base", "x", "--alone"), "more than one base")
    assert parity("score", "--text", text, "--context", CONTEXT, "--chunks", "1", "--alone", "--save-base", "b.base").code == 0
    (tmp_path / "another.txt").write_text(TEXT[::-1])
    refused(parity("score", "--text", "another.txt", "--context", CONTEXT, "--chunks", "1", "--base", "b.base"), "another text")
