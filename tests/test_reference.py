"""Proves that the reference's dumps are what llama.cpp computed: every point, exact shapes, no effect of the capture."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints import points
from checkpoints.errors import InputError
from checkpoints.reading.reader import read
from checkpoints.tensors import TensorReader
from parity.diff.compare import compare
from parity.models import embedded
from reference.client import Reference
from reference.jobs import EXACT, NATIVE, DumpJob, DumpResult

MODEL = Path(__file__).parent.parent / "parity" / "models" / "stories-14m-q8_0.gguf"
TEXT = "Once upon a time there was a"
SHAPES = {"D": 256, "H*d": 256, "K*d": 64, "F": 512, "V": 2048, "H": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the module's files."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def tokens(reference: Reference) -> tuple[int, ...]:
    """The prompt's ids."""
    return reference.tokenize(MODEL, TEXT).ids


@pytest.fixture(scope="module")
def whole(reference: Reference, folder: Path, tokens: tuple[int, ...]) -> DumpResult:
    """Every point of a prompt and three generated tokens, with full tensors."""
    return reference.dump(
        DumpJob(MODEL, folder / "whole.jsonl", tokens, prompt=TEXT, points="all", full=True, generate=3, window="off")
    )


def _captured(
    reference: Reference, tokens: tuple[int, ...], expression: str | None, mode: str = EXACT
) -> dict[str, NDArray[np.float32]]:
    return {node.point: value for node, value in reference.capture(MODEL, tokens, expression, mode)}


def test_tokens(reference: Reference) -> None:
    """A text becomes llama.cpp's ids, BOS first, whose pieces are the text again."""
    tokens = reference.tokenize(MODEL, TEXT)
    assert tokens.ids[0] == tokens.bos == 2047
    assert tokens.add_bos
    assert "".join(tokens.pieces[1:]) == TEXT
    assert reference.pieces(MODEL, tokens.ids) == list(tokens.pieces)
    assert reference.tokenize(MODEL, TEXT, add_special=False).ids == tokens.ids[1:]
    assert (tokens.n_vocab, tokens.n_ctx_train, tokens.architecture) == (2048, 512, "qwen2")


def test_every_point_with_its_shape(whole: DumpResult, tokens: tuple[int, ...]) -> None:
    """All points of the vocabulary that a qwen2 model has are there, at every position, with the vocabulary's shapes."""
    dump = read(whole.out)
    present = {kind.name for kind in points.LAYER_KINDS} - {"q_norm", "k_norm"}
    expected = points.all_points(24, present)
    assert [name for name in points.order(whole.points) if points.parse(name).known] == expected
    assert dump.end is not None
    assert dump.records == whole.records == len(whole.points) * (len(tokens) + 3)
    for name in expected:
        rows = dump.points[name]
        assert rows.token_idx.tolist() == list(range(len(tokens) + 3))
        assert rows.decode.tolist() == [False] * len(tokens) + [True] * 3
        assert rows.step.tolist() == [0] * len(tokens) + [1, 2, 3]
        kind = points.parse(name).known
        assert kind is not None
        for position, shape in zip(rows.token_idx, rows.shapes, strict=True):
            full = tuple(SHAPES.get(letter, int(position) + 1) for letter in kind.row)
            assert shape == (full[1:] if full[0] == 1 else full)  # a reader drops leading ones


def test_softmax_rows_sum_to_one(whole: DumpResult, tokens: tuple[int, ...]) -> None:
    """Attention weights of the positions seen sum to 1 in each head, and none goes to a later position."""
    dump = read(whole.out)
    for layer in (0, 11, 23):
        rows = dump.points[f"blk.{layer}.kq_soft_max"]
        np.testing.assert_allclose(rows.stats["sum"], 8, rtol=1e-5)
        assert not rows.stats["future_mass"].any()
        assert len(rows) == len(tokens) + 3


def test_default_points_are_seven_vectors(reference: Reference, folder: Path, tokens: tuple[int, ...]) -> None:
    """The default set is seven points, and at one position they are seven different vectors."""
    result = reference.dump(DumpJob(MODEL, folder / "default.jsonl", tokens))
    assert result.points == ("embd", *(f"blk.{i}.l_out" for i in (0, 5, 10, 23)), "output_norm", "logits")
    dump = read(result.out)
    vectors = np.stack([dump.points[name].values[2] for name in result.points])
    assert len(np.unique(vectors, axis=0)) == 7


def test_header(whole: DumpResult, tokens: tuple[int, ...]) -> None:
    """The header names the original model, not the twin that was computed, and how it was computed."""
    header = read(whole.out).header
    assert header is not None
    assert header == whole.header
    assert (header.source, header.mode, header.compute, header.kv_type) == ("llama.cpp", "exact", "f32", "f32")
    assert (header.model.name, header.model.file_type, header.model.layers) == ("stories-14m", "Q8_0", 24)
    assert header.tokens == tokens
    assert header.prompt == TEXT
    assert header.build["flash_attention"] is False
    assert whole.computed.name.endswith("-f32.gguf")


def test_looking_changes_nothing(reference: Reference, tokens: tuple[int, ...]) -> None:
    """Logits are the same to the bit with nothing, the default set and every point captured."""
    for mode in (EXACT, NATIVE):
        alone = _captured(reference, tokens, "logits", mode)["logits"]
        np.testing.assert_array_equal(alone, _captured(reference, tokens, "default", mode)["logits"])
        np.testing.assert_array_equal(alone, _captured(reference, tokens, None, mode)["logits"])


def test_uncaptured_logits(tokens: tuple[int, ...]) -> None:
    """A context without any tap gives the captured logits to the bit."""
    from reference.library import Library
    from reference.model import Model
    from reference.naming import plan
    from reference.session import Session

    library = Library()
    with Model(library, MODEL) as model, Session(model, n_ctx=64, n_batch=len(tokens)) as session:
        planned = plan(session.list_nodes(tokens))
        session.decode(tokens, 0)
        silent = session.logits()
        session.clear()
        seen: list[str] = []
        session.decode(tokens, 0, planned, lambda item, _value: seen.append(item.point))
        assert len(seen) == len(planned)
        np.testing.assert_array_equal(session.logits(), silent)


def test_callback_error_comes_out(tokens: tuple[int, ...]) -> None:
    """An exception inside the callback is raised by decode, at once, and the session goes on working."""
    from reference.library import Library
    from reference.model import Model
    from reference.naming import plan
    from reference.session import Session

    def fail(item: object, value: object) -> None:
        raise ZeroDivisionError("in the callback")

    library = Library()
    with Model(library, MODEL) as model, Session(model, n_ctx=64, n_batch=len(tokens)) as session:
        planned = plan(session.list_nodes(tokens))
        with pytest.raises(ZeroDivisionError, match="in the callback"):
            session.decode(tokens, 0, planned, fail)
        session.clear()
        session.decode(tokens, 0)
        assert np.isfinite(session.logits()).all()


def test_values_follow_from_each_other(whole: DumpResult) -> None:
    """Residual sums, SwiGLU and attention recomputed from the recorded tensors give the recorded results."""
    assert whole.tensors is not None
    tensors = TensorReader(whole.tensors)

    def of(kind: str, step: int = 0) -> NDArray[np.float64]:
        return tensors.get(f"blk.7.{kind}", step).astype(np.float64)

    def near(a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    near(of("ffn_inp") + of("ffn_out"), of("l_out"))
    gate = of("ffn_gate")
    near(gate / (1 + np.exp(-gate)) * of("ffn_up"), of("ffn_swiglu"))
    for step in (0, 3):
        queries = of("q_rope", step).reshape(-1, 8, 32)
        keys = of("k_read", step).reshape(-1, 2, 32).repeat(4, axis=1)
        values = of("v_read", step).reshape(-1, 2, 32).repeat(4, axis=1)
        near(np.einsum("thd,shd->hts", queries, keys), of("kq", step))
        near(np.einsum("hts,shd->thd", of("kq_soft_max", step), values).reshape(len(queries), -1), of("kqv_out", step))


def test_cache_of_a_decode_step(reference: Reference, whole: DumpResult, tokens: tuple[int, ...]) -> None:
    """What a decode step reads from the cache is what a prefill of the same tokens reads, and what was computed."""
    assert whole.tensors is not None
    tensors = TensorReader(whole.tensors)
    prefill = _captured(reference, (*tokens, *whole.generated), "blk.{0,23}.{k_read,v_read}")
    for name, value in prefill.items():
        np.testing.assert_allclose(tensors.get(name, 3), value, rtol=1e-4, atol=1e-5)
        written = name.replace("k_read", "k_rope").replace("v_read", "v")
        rows = np.concatenate([tensors.get(written, step).reshape(-1, 64) for step in range(4)])
        np.testing.assert_array_equal(tensors.get(name, 3), rows)


@pytest.mark.slow
def test_generate_then_lead(reference: Reference, folder: Path, whole: DumpResult) -> None:
    """Following the ids that were chosen before gives the same dump, tokens included."""
    job = DumpJob(MODEL, folder / "led.jsonl", whole.header.tokens, points="all", lead=whole.generated, window="off")
    led = reference.dump(job)
    assert led.chosen == led.generated == whole.generated
    first, second = read(whole.out), read(led.out)
    assert first.tokens == second.tokens
    assert [token.id for token in first.tokens] == list(whole.generated)
    assert all(token.top[0][0] == token.id and len(token.top) == 5 for token in first.tokens)
    for name, rows in first.points.items():
        np.testing.assert_array_equal(rows.values, second.points[name].values)


def test_another_lead(reference: Reference, folder: Path, tokens: tuple[int, ...]) -> None:
    """A lead is followed where the model would have chosen otherwise, and its own choice is reported."""
    led = reference.dump(DumpJob(MODEL, folder / "other.jsonl", tokens, lead=(5, 6), generate=1))
    assert led.generated[:2] == (5, 6)
    assert led.chosen[:2] != (5, 6)
    assert len(led.generated) == 3


def test_positions_layers_slice(reference: Reference, folder: Path, tokens: tuple[int, ...]) -> None:
    """`positions`, `layers` and `slice` select what is recorded."""
    job = DumpJob(MODEL, folder / "some.jsonl", tokens, layers=(3, 7), positions="last", slice_size=4, generate=1)
    dump = read(reference.dump(job).out)
    assert list(dump.points) == ["embd", "blk.3.l_out", "blk.7.l_out", "output_norm", "logits"]
    assert dump.points["logits"].token_idx.tolist() == [len(tokens) - 1, len(tokens)]
    assert dump.points["logits"].values.shape == (2, 4)
    some = read(reference.dump(replace(job, positions=(1, len(tokens)), slice_size=None)).out)
    assert some.points["logits"].token_idx.tolist() == [1, len(tokens)]
    assert some.points["logits"].full().all()


def test_a_run_repeats_itself(reference: Reference, folder: Path, tokens: tuple[int, ...]) -> None:
    """The same job gives the same values to the bit, and with another number of threads the same but for rounding."""
    job = DumpJob(MODEL, folder / "one.jsonl", tokens, points="*.l_out,logits", slice_size=None, threads=1)
    dumped = read(reference.dump(job).out)
    again = read(reference.dump(replace(job, out=folder / "again.jsonl")).out)
    two = read(reference.dump(replace(job, out=folder / "two.jsonl", threads=2)).out)
    for name, rows in dumped.points.items():
        np.testing.assert_array_equal(rows.values, again.points[name].values)
    assert compare(two, dumped).verdict == "parity"


def test_node_information(reference: Reference, tokens: tuple[int, ...]) -> None:
    """A captured node tells its operation, parameters, type and operands: what an isolated operation needs."""
    nodes = {
        node.point: node
        for node, _ in reference.capture(MODEL, tokens, "blk.0.{attn_norm,q,q_rope,kq_soft_max,attn_out}", NATIVE)
    }
    assert nodes["blk.0.q_rope"].op == "ROPE"
    assert np.array(nodes["blk.0.q_rope"].op_params[5], np.int32).view(np.float32) == 1e6  # freq_base, in rope's op_params
    assert nodes["blk.0.attn_out"].sources[0].name == "blk.0.attn_output.weight"
    assert nodes["blk.0.attn_out"].sources[0].type == "q8_0"
    scale = np.array(nodes["blk.0.kq_soft_max"].op_params[0], np.int32).view(np.float32)
    assert scale == np.float32(1 / np.sqrt(32))


def test_half_precision_cache(reference: Reference, tokens: tuple[int, ...]) -> None:
    """In native mode the cache may hold F16, and what attention read is rounded to it."""
    pairs = {n.point: v for n, v in reference.capture(MODEL, tokens, "blk.2.{k_rope,k_read}", NATIVE, kv_type="f16")}
    written = pairs["blk.2.k_rope"].reshape(len(tokens), -1)
    np.testing.assert_array_equal(pairs["blk.2.k_read"], written.astype(np.float16).astype(np.float32))


def test_description(reference: Reference) -> None:
    """A model is described by its metadata, sizes, and points with row shapes, in the order of computation."""
    facts = reference.describe(MODEL)
    assert (facts.n_layers, facts.n_embd, facts.n_vocab, facts.n_ctx_train) == (24, 256, 2048, 512)
    assert facts.metadata["qwen2.attention.head_count_kv"] == "2"
    shapes = dict(facts.points)
    assert shapes["blk.0.k_read"] == ("t+1", "64")
    assert shapes["blk.23.kq"] == ("8", "t+1")
    assert shapes["logits"] == ("2048",)
    assert [node.point for node in facts.nodes] == list(shapes)


def test_wrong_points(reference: Reference, folder: Path, tokens: tuple[int, ...]) -> None:
    """A point that the graph doesn't have is named, with the nearest ones."""
    with pytest.raises(InputError, match=r"there is no point 'blk.0.kw'.*blk\.0\.k"):
        reference.dump(DumpJob(MODEL, folder / "none.jsonl", tokens, points="blk.0.kw"))
    assert not (folder / "none.jsonl").exists()


WAYS = {
    "ubatches of one": {"ubatch": 1},
    "ubatches of two, the last of one": {"ubatch": 2},
    "a saved state": {"saved": 2},
    "among shorter and longer sequences": {"companions": ((5, 6), tuple(range(8, 20)))},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_computing_a_prompt(reference: Reference, folder: Path, tokens: tuple[int, ...], way: str) -> None:
    """In ubatches, from a saved state and in a batch llama.cpp computes every point of every position as it does alone."""
    dumps = []
    for number, ways in enumerate(({}, WAYS[way])):
        out = folder / f"{number}.jsonl"
        reference.dump(DumpJob(embedded.path(), out, (*tokens, 11)[: len(tokens) | 1], points="all", **ways))
        dumps.append(read(out))
    verdict = compare(*dumps)
    assert verdict
    assert not verdict.missing_ours.records
    assert not verdict.missing_ref.records
