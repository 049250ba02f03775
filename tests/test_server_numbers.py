"""What a server's numbers say: KL divergence of the candidates that it lists, truncations, penalties and biases."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import Struct

from checkpoints.answers.server import ServerAnswer, ServerCause
from parity.score.measures import Listed, largest, log_sum
from parity.server import choices
from parity.server.ask import PlacedPrediction
from parity.server.base import kl, listed
from parity.server.choices import unfaithful
from parity.server.numbers import tells
from parity.server.penalties import BANNED, Seen, biases, less, repeated, subtracted, with_bias
from parity.server.predictions import TokenCandidate
from parity.server.sampler_causes import truncation
from parity.server.truncation import truncations
from parity.server.vocabulary import Vocabulary
from reports.server import sentence


def test_kl_is_a_lower_bound_of_the_whole() -> None:
    """Over a server's five candidates and one entry for the rest, KL is at most that of whole rows, and 0 for the same row."""
    random = np.random.default_rng(0)
    row, other = (random.normal(0, 2, 300).astype(np.float32) for _ in range(2))
    vocabulary = Vocabulary([f"t{number}" for number in range(300)])
    log = other - np.log(np.exp(other.astype(np.float64)).sum())
    top = np.argsort(-other)[:5]
    server = listed([TokenCandidate(f"t{n}", float(log[n])) for n in top], vocabulary, row)
    p = row - np.log(np.exp(row.astype(np.float64)).sum())
    assert 0 < kl(row, server) <= float(np.sum(np.exp(p) * (p - log)))
    assert kl(other, server) == pytest.approx(0, abs=1e-9)


def test_what_sums_to_more_than_1_is_never_right() -> None:
    """A confident row to the base 10: its entries are all nearly 0, but they sum to more than 1."""
    row = np.array([12.0, 6.0, 1.0, *[-20.0] * 29], dtype=np.float32)
    vocabulary = Vocabulary([f"t{number}" for number in range(32)])
    log = row - np.log(np.exp(row.astype(np.float64)).sum())
    server = listed([TokenCandidate(f"t{n}", float(log[n] / np.log(10))) for n in range(3)], vocabulary, row)
    assert kl(row, server) > 0.05
    assert kl(row, listed([TokenCandidate(f"t{n}", float(log[n])) for n in range(3)], vocabulary, row)) == pytest.approx(
        0, abs=1e-9
    )


def test_numbers_that_are_none_are_no_truncation() -> None:
    """A model that computes NaN in llama.cpp, too, is no traceback."""
    row = np.array([1.0, np.nan, 3.0, 0.5], dtype=np.float32)
    server = Listed(np.array([2, 0]), np.array([-0.1, -2.0]))
    case: Any = SimpleNamespace(sample=[(None, row)], listed=lambda *_: server, of=lambda *_: 1.0, limit=0.1)
    assert truncation(case) is None


@pytest.mark.parametrize(("what", "kept"), [("a top-k of 7", 7), ("a top-p of 0.9", None), ("a min-p of 0.1", None)])
def test_a_truncation_is_found_by_its_offsets(what: str, kept: int | None) -> None:
    """Rows cut by top-k, top-p or min-p: of the three that fit best, one is it, and it leaves the same tokens."""
    random = np.random.default_rng(3)
    rows = [random.normal(0, 2, 300).astype(np.float32) for _ in range(8)]
    offsets, cuts = [], []
    for row in rows:
        p = np.sort(np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum())[::-1]
        count = kept or (int(np.searchsorted(np.cumsum(p), 0.9)) + 1 if "top-p" in what else int((p >= 0.1 * p[0]).sum()))
        offsets.append(float(-np.log(p[:count].sum())))
        cuts.append(count)
    fit = next(truncation for truncation in truncations(rows, offsets) if truncation.what == what)
    assert [int((fit.left(row) > -60).sum()) for row in rows] == cuts


def _kept_by(sampler: Any, row: np.ndarray) -> list[int]:
    """The tokens that one of llama.cpp's samplers leaves of a row of logits."""
    import llama_cpp

    data = (llama_cpp.llama_token_data * len(row))(*((token, float(logit), 0.0) for token, logit in enumerate(row)))
    array = llama_cpp.llama_token_data_array(data, len(row), -1, False)
    llama_cpp.llama_sampler_apply(sampler, array)
    llama_cpp.llama_sampler_free(sampler)
    left = [array.data[place] for place in range(array.size)]
    return sorted(item.id for item in left if np.isfinite(item.logit))


@pytest.mark.parametrize(
    ("what", "sampler"),
    [
        ("a top-n-sigma of 1.5", lambda llama: llama.llama_sampler_init_top_n_sigma(1.5)),
        ("a typical-p of 0.5", lambda llama: llama.llama_sampler_init_typical(0.5, 1)),
        ("an XTC threshold of 0.05", lambda llama: llama.llama_sampler_init_xtc(1.0, 0.05, 1, 7)),
        ("Mirostat 2 with a tau of 2.5", lambda llama: llama.llama_sampler_init_mirostat_v2(7, 2.5, 0.1)),
    ],
)
def test_a_sampler_that_keeps_other_tokens_than_the_likeliest_is_llama_cpps(what: str, sampler: Callable[[Any], Any]) -> None:
    """What llama.cpp's own sampler leaves of a row is what the truncation that fits its probabilities leaves."""
    import llama_cpp

    random = np.random.default_rng(3)
    rows = [random.normal(0, 2, 300).astype(np.float32) for _ in range(8)]
    kept = [_kept_by(sampler(llama_cpp), row) for row in rows]
    offsets = [log_sum(row) - log_sum(row[tokens]) for row, tokens in zip(rows, kept, strict=True)]
    fit = next(truncation for truncation in truncations(rows, offsets) if truncation.what == what)
    assert [np.flatnonzero(fit.left(row) > -60).tolist() for row in rows] == kept


@pytest.mark.parametrize("mass", [0.3, 0.6])
def test_typical_p_is_told_from_others_by_a_quantised_server_s_numbers(mass: float) -> None:
    """Numbers that are off by 0.05, as a quantised server's: of all kinds of truncation it leaves the tokens that are listed."""
    random = np.random.default_rng(int(100 * mass))
    off = {}
    rows = [random.normal(0, 2.5, 200).astype(np.float32) for _ in range(20)]
    noisy = [row + random.normal(0, 0.05, 200).astype(np.float32) for row in rows]
    kept = [typical(row, mass) for row in noisy]
    gains = [log_sum(row) - log_sum(row[tokens]) for row, tokens in zip(noisy, kept, strict=True)]
    for fit in truncations(rows, gains):
        left = [np.flatnonzero(fit.left(row) > -60) for row in rows]
        off[fit.what] = sum(not np.array_equal(a, np.flatnonzero(b)) for a, b in zip(left, kept, strict=True))
    assert min(off, key=lambda what: off[what]).startswith("a typical-p of 0."), off


def typical(row: np.ndarray, mass: float) -> np.ndarray:
    """Typical-p by its definition: tokens by how far their surprise is from the entropy, until they have this probability."""
    p = np.exp(row.astype(np.float64) - log_sum(row))
    distance = np.abs(-np.log(p) - float(-(p * np.log(p)).sum()))
    left, total = np.zeros(len(row), dtype=bool), 0.0
    for token in sorted(range(len(row)), key=lambda token: distance[token]):
        left[token] = True
        total += p[token]
        if total > mass:
            return left
    return left


class Chosen(Struct):
    """Steps of a server of ten tokens: the tokens before, its log-probabilities of tokens 0 to 2, and the one that it chose."""

    steps: tuple[tuple[tuple[int, ...], tuple[float, float, float], int], ...]

    def cause(self) -> ServerCause:
        """What `choices.cause` says of them; llama.cpp's numbers are off by 0.04, as another arithmetic's."""
        placed, tokens = [], self.steps[-1][0]
        for before, logprobs, chosen in self.steps:
            candidates = tuple(TokenCandidate(f"t{n}", value, n) for n, value in enumerate(logprobs))
            row = np.full(10, -6.0, dtype=np.float32)
            row[:3] = np.array(logprobs) + 6 + np.array((0.04, -0.04, 0.02))
            placed.append((PlacedPrediction(len(before) - 1, candidates, candidates[chosen], chosen=chosen), row))
        wrong = unfaithful([item for item, _ in placed])
        return choices.cause(placed, tokens, wrong, Vocabulary([f"t{n}" for n in range(10)]))


def test_choices_that_no_penalty_makes_are_not_called_one() -> None:
    """A better token that was never seen, by 0.05: a sampler, though llama.cpp's own numbers are as far off as that."""
    steps = (((5, 6), (-0.7, -0.75, -3.0), 1), ((5, 6, 1), (-0.7, -0.75, -3.0), 1))
    cause = Chosen(steps).cause()
    assert cause.name == "sampler"
    assert "no repeat penalty explains that" in cause.sentence


def test_one_choice_names_no_repeat_penalty() -> None:
    """A single wrong choice fits many penalties: what would explain it is said, and not that it is the cause."""
    cause = Chosen((((0, 6), (-0.7, -0.9, -3.0), 1),)).cause()
    assert cause.name == "sampler"
    assert "would explain this one choice" in cause.sentence


@pytest.mark.parametrize(("first", "said"), [(5, False), (6, True)])
def test_dry_is_named_where_it_explains_as_much(first: int, said: bool) -> None:
    """Two choices that a repeat penalty explains: DRY may be it where each token that was passed over would repeat what followed before."""
    steps = (((first, 0, 6), (-0.7, -0.9, -3.0), 1), ((first, 0, 6, 1, 6), (-0.7, -3.0, -0.9), 2))
    cause = Chosen(steps).cause()
    assert cause.name == "repeat-penalty"
    assert ("so may DRY" in cause.sentence) is said


def test_a_penalty_of_chosen_tokens_alone_is_found() -> None:
    """llama-cpp-python's server does not count the prompt: a token of the prompt is chosen, and passed over once it was chosen."""
    steps = (
        ((5, 0, 6), (-0.7, -0.8, -3.0), 0),
        ((5, 0, 6, 0), (-0.7, -0.9, -3.0), 1),
        ((5, 0, 6, 0, 1), (-0.7, -3.0, -0.9), 2),
    )
    cause = Chosen(steps).cause()
    assert cause.name == "repeat-penalty"
    assert "on the tokens that it chose" in cause.sentence


def test_a_penalty_is_llama_cpps() -> None:
    """Positive logits of seen tokens are divided, negative ones multiplied, others left (llama_sampler_penalties)."""
    row = np.array([2.0, -2.0, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(repeated(row, (0, 1, 1), 2.0), np.array([1.0, -4.0, 1.0], dtype=np.float32))


def test_penalties_and_biases_are_fitted_from_a_few_candidates() -> None:
    """Presence and frequency penalties, a bias of two tokens and a ban: from the ten candidates that a server lists of 300 tokens."""
    random = np.random.default_rng(5)
    rows = [random.normal(0, 3, 300).astype(np.float32) for _ in range(24)]
    before = [random.choice(np.argsort(-row)[:10], 6).tolist() for row in rows]

    def seen(change: Callable[[np.ndarray, list[int]], np.ndarray]) -> list[Seen]:
        sample = []
        for row, tokens in zip(rows, before, strict=True):
            changed = change(row, tokens)
            ids = largest(changed, 10)
            noise = random.normal(0, 0.01, 10)
            sample.append(Seen(Listed(ids, changed[ids].astype(np.float64) - log_sum(changed) + noise), row, tokens))
        return sample

    both = subtracted(seen(lambda row, tokens: less(row, tokens, 0.6, 0.4)))
    assert both == pytest.approx((0.6, 0.4), abs=0.05)
    assert subtracted(seen(lambda row, _: row)) is None
    often = int(np.argmax(np.sum(rows, axis=0)))
    top = int(max(rows, key=lambda row: np.ptp(row[largest(row, 10)])).argmax())
    bias = {often: 6.0, top: BANNED}
    assert biases(seen(lambda row, _: with_bias(row, bias))) == {often: pytest.approx(6.0, abs=0.2), top: BANNED}
    assert biases(seen(lambda row, _: row)) == {}


def test_improbable_candidates_explain_nothing() -> None:
    """Numbers of tokens that llama.cpp thinks impossible can be read in any way: then no reading is tried."""
    assert tells([np.array([-0.5, -1.5]), np.array([-0.2, -9.0])])
    assert not tells([np.array([-18.0, -19.0]), np.array([-12.0, -15.0]), np.array([-0.1])])
    assert not tells([])


@pytest.mark.parametrize(
    ("count", "sentence_part"), [(1, "1 choice is not the most probable token"), (2, "2 choices are not the most")]
)
def test_choices_of_the_sampler_are_counted(count: int, sentence_part: str) -> None:
    """Predictions that agree and choices that are not the most probable ones: the sentence counts the latter."""
    chosen = tuple((position, "a", "b") for position in range(count))
    assert sentence_part in sentence(ServerAnswer("", "", "", "", 1, (1,), (), 1.0, 0.0, True, 1, 0.0, unfaithful=chosen))
