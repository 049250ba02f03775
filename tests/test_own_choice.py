"""An engine that chooses its own tokens: the first choice that is another is the headline, not the embedding after it."""

from pathlib import Path

import pytest
from cli import Cli

from checkpoints.reading.reader import read
from engine.backend import choose
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.run.ours import OursJob, dump


@pytest.fixture(scope="module")
def engine(stories: Path) -> Transformer:
    """Our engine as somebody's."""
    return Transformer(GgufModel(stories), choose("numpy"))


@pytest.mark.parametrize(("own", "verdict"), [(2, "divergence"), pytest.param(4, "parity", marks=pytest.mark.slow)])
def test_the_first_other_choice_is_the_headline(engine: Transformer, parity: Cli, own: int, verdict: str) -> None:
    """Bare lines of an engine that follows llama.cpp for `own` tokens and then goes its own way: told at `tokens`, all before agrees."""
    assert parity("dump", "ref", "--prompt", "Once upon a time", "--generate", "4", "-o", "ref.jsonl").code == 0
    ref = read("ref.jsonl")
    assert ref.header is not None
    ids = tuple(token.id if number < own else 55 for number, token in enumerate(ref.tokens))
    dump(engine, OursJob(Path("whole.jsonl"), ref.header.tokens, generated=ids, generated_pieces=("",) * len(ids)))
    lines = [line for line in Path("whole.jsonl").read_text().splitlines() if '"checkpoint":' in line]
    Path("ours.jsonl").write_text("\n".join(lines))
    code, answer = parity.json("diff", "ours.jsonl", "ref.jsonl", "--compute", "f32")
    assert answer["verdict"] == verdict
    if verdict == "divergence":
        position = len(ref.header.tokens) + own
        assert (code, answer["first_divergence"]["checkpoint"], answer["first_divergence"]["token_idx"]) == (
            1,
            "tokens",
            position,
        )
        assert answer["pattern"]["code"] == "own-choice"
        assert answer["compared"] == 7 * position
        printed = parity("diff", "ours.jsonl", "ref.jsonl", "--compute", "f32").out
        assert f"divergence at tokens, position {position}" in printed
        assert "chooses for itself" in printed


def test_an_embedding_that_is_wrong_stays_one(engine: Transformer, parity: Cli) -> None:
    """Where the dump says that it took llama.cpp's token, another row of the embedding is the embedding's fault."""
    assert parity("dump", "ref", "--prompt", "Once upon a time", "--generate", "2", "-o", "ref.jsonl").code == 0
    ref = read("ref.jsonl")
    assert ref.header is not None
    dump(engine, OursJob(Path("ours.jsonl"), ref.header.tokens, generated=(55, 55), generated_pieces=("", "")))
    text = Path("ours.jsonl").read_text()
    for token in ref.tokens:
        text = text.replace(f'"token_idx":{token.token_idx},"id":55', f'"token_idx":{token.token_idx},"id":{token.id}')
    Path("ours.jsonl").write_text(text)
    code, answer = parity.json("diff", "ours.jsonl", "ref.jsonl")
    assert (code, answer["first_divergence"]["checkpoint"]) == (1, "embd")
