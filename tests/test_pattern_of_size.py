"""How far off a point is, and in which elements, bounds what is named: a transposed matrix leaves no element right."""

from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import TOKENS, Faulty, Planted

from checkpoints.record import Dump
from checkpoints.summary import summarise
from parity.diff.compare import Options, compare

Edit = Callable[[NDArray[np.float32]], NDArray[np.float32]]
F32 = Options(compute="f32")


@pytest.fixture(scope="module")
def right(faulty: Faulty) -> Dump:
    """A right engine's dump of whole rows."""
    return faulty.dump(Planted(()), TOKENS, points="all", size=None, bare=False)


def pattern(right: Dump, edits: dict[str, Edit], only: tuple[str, ...] = ()) -> str:
    """What `diff` says of a dump of 16 values a row, with a sketch, some of whose rows were edited; `only` these points, or all."""

    def leading(edits: dict[str, Edit]) -> Dump:
        points = {
            name: summarise(name, edits.get(name, np.copy)(rows.values), rows.token_idx, slice_size=16)
            for name, rows in right.points.items()
            if (not only or name in only) and len(rows.shapes[0]) < 2
        }
        return replace(right, points=points)

    found = compare(leading(edits), leading({}), F32).pattern
    return found.sentence if found is not None else ""


def behind(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Three elements that no slice of 16 shows are garbage."""
    values = values.copy()
    values[:, [20, 40, 60]] = (91.5, 88.25, 120)
    return values


def test_garbage_behind_the_recorded_elements_is_no_transposed_matrix(right: Dump) -> None:
    """Sixteen right logits at every position: the product as a whole is right, elements behind them are not."""
    sentence = pattern(right, {"logits": behind})
    assert "elements that were not recorded" in sentence
    assert "transposed" not in sentence
    assert "elements that were not recorded" in pattern(
        right, {"blk.2.q": behind, "blk.2.q_rope": behind, "blk.2.kqv_out": behind}
    )


def test_a_constant_is_said_as_one(right: Dump) -> None:
    """0.02 less in every element of a product is neither another layer's weights nor a transposed one."""
    last = list(right.points)[-1]
    assert pattern(right, {last: lambda values: values - np.float32(0.02)}).startswith(
        f"{last}: every recorded element is the reference's minus 0.02"
    )


def exchanged(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Elements 5 and 6 in each other's place."""
    values = values.copy()
    values[:, [5, 6]] = values[:, [6, 5]]
    return values


def test_a_law_of_all_recorded_elements_is_said(right: Dump) -> None:
    """Two elements that are exchanged, and a vector that is added at every position, are said as such, not as another layer's weights."""
    vector = np.random.default_rng(5).normal(0, 1, right.points["logits"].values.shape[1]).astype(np.float32)
    assert pattern(right, {"logits": exchanged}).endswith(
        "agree: elements 5 and 6 are exchanged; the other recorded ones are right"
    )
    assert "has the same vector added at every position" in pattern(right, {"logits": lambda values: values + vector})


def test_a_law_says_only_what_it_saw(right: Dump) -> None:
    """Rows that grow with the position have no law by what the shortest one has, and no law takes a row's number for its position."""

    def said(name: str, edit: Edit, first: int = 0) -> str:
        ref = {of: rows.take(np.arange(first, len(TOKENS))) for of, rows in right.points.items()}
        names = list(ref)
        ours = {of: replace(ref[of], values=1 - ref[of].values) for of in names[names.index(name) :]}
        ours[name] = replace(ref[name], values=edit(ref[name].values))
        found = compare(replace(right, points=ref | ours), replace(right, points=ref), F32).pattern
        return found.sentence if found is not None else ""

    def first_ones_changed(values: NDArray[np.float32]) -> NDArray[np.float32]:
        some = np.arange(values.shape[1]) < right.points["blk.2.kq"].counts[1]
        return np.concatenate([values[:1], np.where(some, 0.5 * values[1:] + 1, values[1:])]).astype(np.float32)

    def again(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([values[:5], values[:1]])

    sentence = said("blk.2.kq", first_ones_changed)
    assert "its inputs agree" in sentence
    assert "every" not in sentence.partition("agree")[2]
    assert "position 5 holds" not in said("blk.2.ffn_up", again, first=1)
    assert said("blk.2.ffn_up", np.abs).endswith("every element is the right one without its sign")


def test_what_all_consumers_share_is_either_the_rest_or_one_fault(right: Dump) -> None:
    """Q, K and V without their biases differ as they would if the rest of what they read did: neither is called likelier."""
    shifts = {f"blk.2.{kind}": lambda values: values + np.arange(values.shape[1], dtype=np.float32) for kind in "qkv"}

    def bare(edits: dict[str, Edit]) -> Dump:
        points = {f"blk.2.{kind}": right.points[f"blk.2.{kind}"] for kind in ("attn_norm", "q", "k", "v")}
        cut = {of: replace(rows, values=edits.get(of, np.copy)(rows.values)[:, :16]) for of, rows in points.items()}
        none = {of: replace(rows, stats={}, sketch=None, counts=np.minimum(rows.counts, 16)) for of, rows in cut.items()}
        return replace(right, points=none)

    operation = compare(bare(shifts), bare({}), F32).operation
    assert operation is not None
    assert operation.endswith(
        "blk.2.k and blk.2.v, computed from it, differ, too: the rest of blk.2.attn_norm, or one fault in all of them"
    )


def test_where_most_elements_are_right_no_matrix_is_transposed(right: Dump) -> None:
    """Three large wrong elements without a law, other ones at each position, make the error of unrelated rows, but not their values."""

    def some(values: NDArray[np.float32]) -> NDArray[np.float32]:
        values, rng = values.copy(), np.random.default_rng(5)
        for row in values:
            row[rng.permutation(16)[:3]] = rng.normal(0, 20, 3)
        return values

    sentence = pattern(right, {"logits": some})
    assert "transposed" not in sentence
    assert "some of its rows or blocks" in sentence


def test_beside_an_outlier_the_other_elements_are_not_right_unseen(right: Dump) -> None:
    """In BF16 an outlier makes the limit wider than all other elements: those of another matrix are neither right nor most of them."""
    rows = right.points["logits"]
    ref = np.random.default_rng(5).normal(0, 1, rows.values.shape).astype(np.float32)
    ours = np.random.default_rng(6).normal(0, 1, rows.values.shape).astype(np.float32)
    ref[:, 3], ours[:, 7] = 900, 900
    found = compare(
        *(
            replace(right, points=right.points | {"logits": summarise("logits", values, rows.token_idx, slice_size=16)})
            for values in (ours, ref)
        ),
        Options(compute="bf16"),
    ).pattern
    assert found is not None
    assert "transposed" in found.sentence
    assert "right" not in found.sentence


def test_a_small_error_is_no_transposed_matrix(right: Dump) -> None:
    """Rows that are a few per cent off are not those of unrelated weights; rows in another order are."""
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.02, right.points["logits"].values.shape).astype(np.float32)
    sentence = pattern(right, {"logits": lambda values: values * (1 + noise)})
    assert "a factor, a summand, or some of its rows or blocks" in sentence
    shuffled = rng.permutation(right.points["logits"].values.shape[1])
    assert "transposed, or another layer's" in pattern(right, {"logits": lambda values: values[:, shuffled]})


def test_a_transposed_matrix_may_hide_behind_a_bias(right: Dump) -> None:
    """A bias larger than a product's values makes any error of it small: where a row may have one, a transposed matrix is not ruled out."""

    def nearly(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values + np.float32(0.1) * values[:, ::-1]

    after = {f"blk.2.{kind}": nearly for kind in ("q", "q_rope", "kqv_out")}
    assert "transposed, or another layer's, where a bias" in pattern(right, after)


def test_a_position_within_the_limit_is_not_right_for_sure(right: Dump) -> None:
    """In a lower arithmetic one summand is over the limit where rows are small, and just below it where they are large: that is a bias."""
    rows = right.points["blk.2.q"].values
    summand = np.random.default_rng(5).normal(0, 1, rows.shape[1]).astype(np.float32)
    shares = np.sort((summand**2).sum() / (rows**2).sum(axis=1))
    summand *= np.float32((3e-4 / ((shares[1] + shares[2]) / 2)) ** 0.5)
    points = {
        name: replace(of, values=of.values + summand) if name == "blk.2.q" else of
        for name, of in right.points.items()
        if name in ("blk.2.attn_norm", "blk.2.q")
    }
    found = compare(replace(right, points=points), right, Options(compute="bf16"))
    assert found.pattern is not None
    assert 0 < found.points[-1].failed < len(rows)
    assert found.pattern.code == "operation", found.pattern
    assert "bias" in found.pattern.sentence


def test_logits_alone_blame_no_single_operation(right: Dump) -> None:
    """Nothing in front of wrong logits was recorded: the last norm and the output matrix are two operations of a hundred; and what is
    right at the first position, where attention sees one key, is no product."""
    shuffled = np.random.default_rng(5).permutation(right.points["logits"].values.shape[1])
    assert pattern(right, {"logits": lambda values: values[:, shuffled]}, only=("logits",)).endswith(
        "anything from the embedding on: nothing in front of it was recorded"
    )

    def later(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([values[:1], values[1:, shuffled]])

    assert "Q, K, RoPE" in pattern(right, {"logits": later}, only=("logits",))


def test_rows_that_grow_are_read_to_their_ends(right: Dump) -> None:
    """Scores that are negated for the first key's elements alone are not -1 times the right ones, which the shortest row would say."""
    names = ("blk.2.q_rope", "blk.2.k_read", "blk.2.kq")
    points = {name: right.points[name] for name in names}
    scores = points["blk.2.kq"]
    first = np.arange(scores.values.shape[1]) < scores.counts[0]

    def said(values: NDArray[np.float32]) -> str:
        wrong = points | {"blk.2.kq": replace(scores, values=values, stats={}, sketch=None)}
        found = compare(replace(right, points=wrong), replace(right, points=points), F32).pattern
        return found.sentence if found is not None else ""

    assert "times" not in said(np.where(first, -scores.values, scores.values))
    assert "-2 times the reference's: captured before or after a scale" in said(-2 * scores.values)


def test_wrong_positions_of_what_is_made_from_right_ones_are_no_embedding_rows(right: Dump) -> None:
    """Attention's scores, wrong at five of seven positions, where all that they are made from was recorded and agrees."""
    names = ("blk.2.q_rope", "blk.2.k_read", "blk.2.kq")
    points = {name: right.points[name] for name in names}
    scores = points["blk.2.kq"]
    values = np.where(np.isin(scores.token_idx, (1, 2, 4, 5, 6))[:, None], scores.values[:, ::-1], scores.values)
    values = np.where(np.isnan(scores.values), np.nan, np.nan_to_num(values, nan=3.0)).astype(np.float32)
    wrong = points | {"blk.2.kq": replace(scores, values=values, stats={}, sketch=None)}
    found = compare(replace(right, points=wrong), replace(right, points=points), F32).pattern
    assert found is not None
    assert "embedding" not in found.sentence
    assert "what it is made from is right there" in found.sentence
