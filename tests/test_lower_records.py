"""Records in a lower arithmetic that nothing made from them contradicts: noise, and masks that its type cannot hold."""

from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace
from recorded import F32, only

from checkpoints.answers.diff import Limits
from checkpoints.record import Dump, Rows
from checkpoints.summary import summarise
from parity.diff.compare import Options, compare
from parity.diff.measured.masked_values import without_masks
from parity.diff.readings.rounding import cut_to, rounded_to, type_of
from parity.isolate.held import errors_beyond

F16 = Options(compute="f16")


def with_rows(dump: Dump, name: str, change: Callable[[np.ndarray], np.ndarray], compute: str = "f32") -> Dump:
    """A dump of this arithmetic with other values of one point, whole rows."""
    assert dump.header is not None
    rows = dump.points[name]
    made: Rows = summarise(name, change(rows.values.copy()), rows.token_idx, slice_size=None)
    return replace(dump, header=replace(dump.header, compute=compute), points={**dump.points, name: made})


def noise(size: float) -> Callable[[np.ndarray], np.ndarray]:
    """Noise of this NMSE in the row of position 2."""

    def change(values: np.ndarray) -> np.ndarray:
        rms = np.sqrt(np.mean(values[2] ** 2) * size)
        values[2] += np.random.default_rng(1).standard_normal(values.shape[1], dtype=np.float32) * rms
        return values

    return change


@pytest.mark.parametrize(("compute", "size", "right_record"), [("f16", 1e-3, True), ("f16", 0.1, False), ("f32", 1e-3, False)])
def test_noise_that_nothing_made_of_it_has_is_no_other_record(
    right: Dump, ref: Dump, compute: str, size: float, right_record: bool
) -> None:
    """In a stated F16 a row that is off by what rounding can be, and of which all that is made agrees, is no other value than its name
    says; larger errors are, and all in float32.
    """
    ours = with_rows(right, "blk.0.attn_norm", noise(size), compute)
    verdict = compare(ours, ref, Options(compute=compute))
    assert verdict
    assert right_record == (not verdict.record_faults)
    assert right_record == any(note.startswith("noise: 1 record ") for note in verdict.notes)


def masked(values: np.ndarray) -> np.ndarray:
    """Rows whose first elements are float32's smallest number: ids that are never chosen."""
    values[:, :5] = np.finfo(np.float32).min
    return values


def infinite(values: np.ndarray) -> np.ndarray:
    """The same as a lower type holds it."""
    values[:, :5] = -np.inf
    return values


def one_more(values: np.ndarray) -> np.ndarray:
    """An infinity that the reference has not."""
    values = infinite(values)
    values[1, 7] = -np.inf
    return values


def not_a_number(values: np.ndarray) -> np.ndarray:
    """NaN in place of a mask."""
    values = infinite(values)
    values[1, 3] = np.nan
    return values


def test_masks_are_infinite_in_lower_types(right: Dump, ref: Dump) -> None:
    """Where the reference has float32's smallest number as a mask, a type of fewer bits has minus infinity: in stated F16 both agree; in
    float32 they do not, nor does one infinity more, or NaN.
    """
    ref = with_rows(ref, "logits", masked)
    assert compare(with_rows(right, "logits", infinite, "f16"), ref, F16)
    for change, options in ((infinite, F32), (one_more, F16), (not_a_number, F16)):
        verdict = compare(with_rows(right, "logits", change, options.compute or ""), ref, options)
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.checkpoint == "logits"
        assert verdict.pattern is None or verdict.pattern.code != "reference-nonfinite"


@pytest.mark.parametrize("size", [8, None])
@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_masks_do_not_hide_the_values_beside_them(right: Dump, ref: Dump, size: int | None, factor: float) -> None:
    """Next to values that mask on both sides, logits 1.001 times as large are found at their row, in few or all values."""

    def scaled(values: np.ndarray) -> np.ndarray:
        values[1] *= np.float32(factor)
        return masked(values)

    def shortened(dump: Dump) -> Dump:
        rows = dump.points["logits"]
        return replace(
            dump, points={**dump.points, "logits": summarise("logits", rows.values, rows.token_idx, slice_size=size)}
        )

    whole = replace(ref, points={**ref.points, "logits": right.points["logits"]})
    verdict = compare(shortened(with_rows(right, "logits", scaled)), shortened(with_rows(whole, "logits", masked)), F32)
    assert bool(verdict) == (factor == 1.0)
    assert verdict or (verdict.first_divergence is not None and verdict.first_divergence.token_idx == 1)


def cut_to_f16(values: np.ndarray) -> np.ndarray:
    """The values without the digits that F16 has not: rounded towards zero."""
    half = values.astype(np.float16)
    return np.where(np.abs(half) > np.abs(values), np.nextafter(half, np.float16(0)), half).astype(np.float32)


def test_an_embedding_whose_digits_are_cut_off_is_no_other_table(right: Dump, ref: Dump) -> None:
    """Embeddings cut off to F16 are said to be that, in float32 a divergence that blames no table; 1.002 times as large they are wrong."""
    assert cut_to(with_rows(right, "embd", cut_to_f16).points["embd"], ref.points["embd"]).startswith("F16")
    assert rounded_to(with_rows(right, "embd", cut_to_f16).points["embd"], ref.points["embd"]) == ""
    verdict = compare(only(with_rows(right, "embd", cut_to_f16), "embd"), ref, F32)
    assert verdict.pattern is not None
    assert verdict.pattern.code == "rounded"
    assert "cut off" in verdict.pattern.sentence
    scaled = compare(only(with_rows(right, "embd", lambda values: cut_to_f16(values * np.float32(1.002))), "embd"), ref, F32)
    assert scaled.pattern is None or scaled.pattern.code != "rounded"


def printed(values: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Values as decimals of this form give them, and the steps of these decimals."""
    texts = [form % value for value in values.ravel()]
    steps = [float(10.0 ** (int((form % value).split("e")[1]) - int(form[2]))) for value in values.ravel()]
    return np.array(texts, np.float32).reshape(values.shape), np.array(steps).reshape(values.shape)


@pytest.mark.parametrize("form", ["%.3e", "%.4e"])
@pytest.mark.parametrize("name", ["blk.0.attn_norm", "blk.1.l_out"])
def test_a_type_is_recognised_behind_fewer_digits_than_it_has(right: Dump, ref: Dump, name: str, form: str) -> None:
    """Values rounded to F16, then printed with four or five digits, are the right ones rounded; printed without F16, or 1.001 times as
    large before they were rounded, they are not.
    """
    rows, right_rows = right.points[name], ref.points[name]

    def type_of_printed(change: Callable[[np.ndarray], np.ndarray]) -> str:
        values, steps = printed(change(rows.values), form)
        return rounded_to(replace(rows, values=values, quantum=steps), right_rows)

    assert type_of_printed(lambda x: x.astype(np.float16).astype(np.float32)) == "F16 or TF32"
    assert type_of_printed(lambda x: x) == ""
    assert type_of_printed(lambda x: (x * np.float32(1.001)).astype(np.float16).astype(np.float32)) == ""


def test_isolate_takes_infinite_masks_for_masks_in_a_lower_arithmetic_alone() -> None:
    """Under a limit wider than float32's an infinity in place of a mask of its sign is left out; others, and all in float32, are not."""
    smallest = np.finfo(np.float32).min
    right = np.array([[1.0, smallest, 2.0, smallest]], np.float32)
    values = np.array([[1.0, -np.inf, -np.inf, np.inf]], np.float32)
    ours, given = without_masks(right, values, 1e-5)
    assert ours.tolist() == [[1.0, 0.0, 2.0, smallest]]
    assert given.tolist() == [[1.0, 0.0, -np.inf, np.inf]]
    assert all(a is b for a, b in zip(without_masks(right, values, 1e-10), (right, values), strict=True))
    ours, given = without_masks(right, right * np.array([1.0, 1.0, 1.5, 1.0], np.float32), 1e-10)
    assert [ours.tolist(), given.tolist()] == [[[1.0, 0.0, 2.0, 0.0]], [[1.0, 0.0, 3.0, 0.0]]]


def in_bf16(values: np.ndarray) -> np.ndarray:
    """The values rounded to BF16, in which the masks among them are infinite."""
    bits = masked(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_masked_logits_in_bf16_are_said_to_be_that(right: Dump, ref: Dump, factor: float) -> None:
    """Logits that an engine of unknown arithmetic keeps in BF16, masks and all, are the reference's rounded to BF16, not a wrong product;
    1.01 times as large they are no rounding.
    """
    ours = with_rows(right, "logits", lambda values: in_bf16(values * np.float32(factor)), "")
    verdict = compare(ours, with_rows(ref, "logits", masked))
    assert verdict.pattern is not None
    assert (verdict.pattern.code == "rounded") == (factor == 1.0)


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_isolate_takes_masks_in_a_lower_type_for_rounding(factor: float) -> None:
    """A result kept in BF16 is its right value rounded, with infinities for its masks; 1.02 times as large it is not."""
    values = np.random.default_rng(3).standard_normal((4, 64), dtype=np.float32)
    dumped = in_bf16(values * np.float32(factor))
    assert type_of(dumped) == "BF16"
    beyond = errors_beyond("BF16", "logits", masked(values), dumped, np.arange(4), None)
    assert bool((beyond > 1e-10).any()) == (factor != 1.0)


def scattered(size: float, factor: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """Noise of this NMSE in every row, times a factor."""

    def change(values: np.ndarray) -> np.ndarray:
        rms = np.sqrt(np.mean(values**2, axis=1, keepdims=True) * np.float32(size))
        drawn = np.random.default_rng(2).standard_normal(values.shape, dtype=np.float32)
        return (values + drawn * rms) * np.float32(factor)

    return change


@pytest.mark.parametrize(("noise", "factor", "said"), [(1e-8, 1.0, "undecided"), (0.0, 1.0, "rounded"), (1e-8, 1.02, "")])
def test_values_of_a_lower_type_beside_noise_are_no_wrong_operation(
    right: Dump, ref: Dump, noise: float, factor: float, said: str
) -> None:
    """Logits kept in BF16, with little noise or none, blame no operation where nothing states the arithmetic; 1.02 times as large
    they do.
    """
    ours = with_rows(right, "logits", lambda values: in_bf16(scattered(noise, factor)(values)), "")
    whole = replace(ref, points={**ref.points, "logits": right.points["logits"]})
    verdict = compare(ours, with_rows(whole, "logits", masked))
    assert not verdict
    assert verdict.pattern is not None
    assert (verdict.pattern.code if verdict.pattern.code in ("undecided", "rounded") else "") == said
    assert not (said and verdict.operation)


@pytest.mark.parametrize(("size", "kv_type", "said"), [(2e-5, "", True), (2e-5, "f32", False), (2e-2, "", False)])
def test_a_cache_of_a_lower_type_that_nothing_states_blames_no_operation(
    right: Dump, ref: Dump, size: float, kv_type: str, said: bool
) -> None:
    """Keys that differ as 8 bits make them, though their queries agree, may be a cache's type where nothing states that; a stated type, or
    a larger error, is none.
    """
    rows = right.points["blk.1.k_read"]
    drawn = np.random.default_rng(4).standard_normal(rows.values.shape[1], dtype=np.float32)
    values = rows.values + drawn * np.float32(np.sqrt(size * np.mean(np.nan_to_num(rows.values) ** 2)))
    assert right.header is not None
    ours = replace(
        right,
        header=replace(right.header, compute="", kv_type=kv_type),
        points={**right.points, "blk.1.k_read": replace(rows, values=values, stats={}, sketch=None)},
    )
    verdict = compare(only(ours, "embd", "blk.0.l_out", "blk.1.k_rope", "blk.1.k_read"), ref)
    assert verdict.pattern is not None
    assert (verdict.pattern.code == "undecided") == said
    assert ("cache of lower type" in verdict.pattern.sentence) == said


@pytest.mark.parametrize(("size", "open_"), [(1e-7, True), (1e-2, False)])
def test_noise_where_attention_has_several_keys_may_be_a_lower_type(right: Dump, ref: Dump, size: float, open_: bool) -> None:
    """A layer that is off by noise everywhere but at position 0 may keep scores in a lower type, where nothing states the arithmetic: the
    answer says so beside the operations in question, unless the noise is larger.
    """

    def later(values: np.ndarray) -> np.ndarray:
        noisy = scattered(size)(values)
        noisy[0] = values[0]
        return noisy

    verdict = compare(only(with_rows(right, "blk.1.l_out", later, ""), "embd", "blk.0.l_out", "blk.1.l_out"), ref)
    assert verdict.pattern is not None
    assert verdict.pattern.sentence.startswith("position 0 is right, 1 and later are wrong")
    assert (verdict.pattern.code == "undecided") == open_


@pytest.mark.parametrize(("less", "factor", "said"), [(20.0, 1.0, True), (-0.01, 1.0, False), (20.0, 1.01, False)])
def test_logits_less_a_number_look_like_log_probabilities(
    right: Dump, ref: Dump, less: float, factor: float, said: bool
) -> None:
    """A part of the logits, all less a number, may be log-probabilities: a divergence that says so, and no product. Larger ones, or also
    scaled ones, are not.
    """
    changed = with_rows(right, "logits", lambda values: values * np.float32(factor) - np.float32(less))
    rows = changed.points["logits"]
    part = summarise("logits", rows.values, rows.token_idx, slice_size=16)
    short = replace(part, stats={}, sketch=None, shapes=((),) * len(part))
    verdict = compare(replace(changed, points={**changed.points, "logits": short}), ref, F32)
    assert not verdict
    assert verdict.pattern is not None
    assert ("log soft max" in verdict.pattern.sentence) == said


def test_errors_of_one_size_around_a_measured_limit_blame_no_position(right: Dump, ref: Dump) -> None:
    """Where limits are measured costs of a stated arithmetic, noise that passes at some positions and fails at others by as little is the
    same error everywhere; without measured limits that is not said.
    """
    ours = only(with_rows(right, "blk.0.l_out", scattered(1e-5), "bf16"), "embd", "blk.0.l_out")
    errors = compare(ours, ref, Options(tolerance=0.0)).worst
    assert errors is not None
    for measured in (True, False):
        points = {"blk.0.l_out": errors.nmse * 0.97} if measured else {}
        allowed = Limits(errors.nmse * 0.97, 1.0, "measured", points=points)
        verdict = compare(ours, ref, Options(compute="bf16", limits=allowed))
        assert verdict.first_divergence is not None
        assert verdict.pattern is not None
        assert (verdict.pattern.code == "precision") == measured, verdict.pattern


@pytest.mark.parametrize(("times", "alike"), [(2.0, True), (20.0, False)])
def test_one_position_that_is_twenty_times_as_wrong_has_no_error_of_one_size(
    right: Dump, ref: Dump, times: float, alike: bool
) -> None:
    """Under measured limits a position alone is named where its error is twenty times the others', not where it is twice as large."""

    def larger(values: np.ndarray) -> np.ndarray:
        noisy = scattered(1e-5)(values)
        noisy[2] = values[2] + (noisy[2] - values[2]) * np.float32(np.sqrt(times))
        return noisy

    ours = only(with_rows(right, "blk.0.l_out", larger, "bf16"), "embd", "blk.0.l_out")
    limit = 1e-5 * times * 0.8
    allowed = Limits(limit, 1.0, "measured", points={"blk.0.l_out": limit})
    verdict = compare(ours, ref, Options(compute="bf16", limits=allowed))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.token_idx == 2
    assert verdict.pattern is not None
    assert (verdict.pattern.code == "precision") == alike, verdict.pattern
