"""The vocabulary of points: aliases, order, expressions, and what does not depend on what."""

import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.errors import InputError
from checkpoints.points import (
    LAYER_KINDS,
    all_points,
    apart,
    default_layers,
    expand,
    layer_outputs,
    order,
    parse,
    resolve,
    select,
)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("C0", "embd"),
        ("C1", "blk.0.l_out"),
        ("C5", "blk.5.l_out"),
        ("C10", "blk.10.l_out"),
        ("C23", "blk.23.l_out"),
        ("C24", "output_norm"),
        ("C25", "logits"),
        ("layer_5", "blk.5.l_out"),
        ("blk.5", "blk.5.l_out"),
        ("l_out-7", "blk.7.l_out"),
        ("kqv_out-3", "blk.3.kqv_out"),
        ("result_norm", "output_norm"),
        ("result_output", "logits"),
        ("lm_head", "logits"),
        ("model.embed_tokens", "embd"),
        ("model.layers.3.self_attn.q_proj", "blk.3.q"),
        ("model.layers.3.mlp.down_proj", "blk.3.ffn_out"),
        ("model.layers.3", "blk.3.l_out"),
        ("model.norm", "output_norm"),
        ("hidden_states[0]", "embd"),
        ("blk.3.something_new", "blk.3.something_new"),
        ("no such thing", "no such thing"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    """The card's, ggml's and Hugging Face's names are known; what is not keeps its name."""
    assert resolve(alias) == name


def test_hidden_states_are_inputs_of_layers() -> None:
    """Index i is layer i's input, the last one the normalised output; without a number of layers it stays unknown."""
    assert [resolve(f"hidden_states[{i}]", 2) for i in range(4)] == ["embd", "blk.0.l_out", "output_norm", "hidden_states[3]"]
    assert resolve("hidden_states[1]") == "hidden_states[1]"


def test_resolving_twice_changes_nothing() -> None:
    """Every canonical name resolves to itself."""
    for name in all_points(3):
        assert resolve(name) == name


@given(st.integers(0, 2**32))
def test_order_is_the_vocabularys(seed: int) -> None:
    """Known points in any order, doubled, come back in dataflow order, each once."""
    names = all_points(12)
    mixed = names * 2
    random.Random(seed).shuffle(mixed)
    assert order(mixed) == names


def test_unknown_nodes_stand_where_they_were_computed() -> None:
    """A node outside the vocabulary follows the known point of its layer that preceded it."""
    names = ["embd", "blk.0.attn_norm", "blk.0.odd", "blk.0.q", "blk.0.l_out", "blk.1.odd", "blk.1.attn_norm", "logits"]
    assert order(names) == names


@pytest.mark.parametrize(
    ("kind", "other", "met"),
    [
        ("q_rope", "k", False),
        ("v", "kq_soft_max", False),
        ("ffn_up", "ffn_gate", False),
        ("q", "kq", True),
        ("kqv_out", "v", True),
        ("q", "q_rope", True),
    ],
)
def test_branches_that_have_not_met_are_apart(kind: str, other: str, met: bool) -> None:
    """Queries, keys, values, and gate and up of one layer lie apart, in both directions, until they meet."""
    lanes = [known.lane for name in (kind, other) if (known := parse(f"blk.1.{name}").known) is not None]
    assert len(lanes) == 2
    assert apart(*lanes) == apart(*reversed(lanes)) == (not met)


def test_expressions_expand_as_in_a_shell() -> None:
    """Lists, ranges in both directions, nesting and commas; unbalanced braces, ranges of no numbers and explosions are refused."""
    assert expand("blk.{1..3}.{q,k}") == ["blk.1.q", "blk.1.k", "blk.2.q", "blk.2.k", "blk.3.q", "blk.3.k"]
    assert expand("embd, blk.{0,2}.l_out") == ["embd", "blk.0.l_out", "blk.2.l_out"]
    assert expand("a{b,c{1..2}}") == ["ab", "ac1", "ac2"]
    assert expand("blk.{3..1}.q") == ["blk.3.q", "blk.2.q", "blk.1.q"]
    for wrong in ("a{b", "a}b{", "{1..99999}", "{99999999..1}", "{1..999}{1..999}", "{1..}", "{..3}", "{a..c}", "{-1..2}"):
        with pytest.raises(InputError):
            expand(wrong)


@given(st.text(alphabet="ab.{},*[]1.", max_size=30))
def test_no_expression_breaks_the_selection(expression: str) -> None:
    """Whatever is typed selects points or is refused as input."""
    with suppress(InputError):
        assert select(expression, all_points(2), 2)


def test_selection() -> None:
    """`default`, `all`, globs and aliases select in the order of the model; what matches nothing suggests a name."""
    names = all_points(24)
    assert select("default", names, 24) == layer_outputs([0, 5, 10, 23])
    assert select("all", names) == names
    assert select("logits,C1,blk.3.q*", names) == ["blk.0.l_out", "blk.3.q", "blk.3.q_norm", "blk.3.q_rope", "logits"]
    with pytest.raises(InputError, match=r"blk\.3\.q_rope"):
        select("blk.3.qrope", names)


def test_default_layers_of_other_depths() -> None:
    """Layers 0, 5, 10 and 23 where they exist, and always the last."""
    assert [default_layers(n) for n in (1, 2, 6, 24, 32)] == [[0], [0, 1], [0, 5], [0, 5, 10, 23], [0, 5, 10, 23, 31]]


def test_known_tells_layer_points_from_model_points() -> None:
    """`logits` inside a layer, or a layer's kind outside of one, is not the vocabulary's."""
    assert parse("blk.0.q").known is not None
    assert parse("blk.0.logits").known is None
    assert parse("q").known is None
    assert len({kind.name for kind in LAYER_KINDS}) == len(LAYER_KINDS)
