"""What a server says about one prediction, read from the three forms in which servers write it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from .http import ServerError

_NEVER = -1e4  # a natural logarithm below it is a probability of 0, however a server writes that (-inf, -3.4e38, -9999)
_LARGEST = 1e4  # no logit, and no other number of a prediction, is larger
_ABOVE = 1e-3  # what rounding adds to a log-probability of 0
_MOST = 1 << 20  # most predictions of one answer


class TokenCandidate(Struct, frozen=True):
    """One token with its log-probability (natural); `id` is None if the server names tokens only by their text."""

    text: str
    logprob: float
    id: int | None = None
    data: bytes | None = None


class Prediction(Struct, frozen=True):
    """What the server said about one position: the token there, and its candidates, most probable first.

    The token's own log-probability is 0 if nothing predicted it (the first token of an echoed prompt).
    """

    token: TokenCandidate
    candidates: tuple[TokenCandidate, ...]


def legacy(logprobs: dict[str, Any], where: str) -> list[Prediction]:
    """OpenAI's first schema: `tokens`, `token_logprobs` and `top_logprobs`, lists of one length; a position's candidates are an
    object of texts (OpenAI, llama-cpp-python, vLLM) or a list of such objects.

    Raises:
        ServerError: the lists do not belong together, or contain something other than numbers.
    """
    tokens, own = logprobs.get("tokens"), logprobs.get("token_logprobs")
    top = logprobs.get("top_logprobs") or [None] * (len(tokens) if isinstance(tokens, list) else 0)
    if not (isinstance(tokens, list) and isinstance(own, list) and isinstance(top, list)) or not len(tokens) == len(own) == len(
        top
    ):
        raise _malformed(where, "tokens, token_logprobs and top_logprobs are not lists of one length")
    _bounded(tokens, where)
    predictions = []
    for text, value, listed in zip(tokens, own, top, strict=True):
        if not isinstance(text, str) or not (listed is None or isinstance(listed, dict | list)):
            raise _malformed(where, "a token is not text, or its candidates are not an object")
        pairs = listed.items() if isinstance(listed, dict) else [item for part in listed or () for item in _pairs(part, where)]
        candidates = [_candidate(name, number, where) for name, number in pairs]
        predictions.append(Prediction(_candidate(text, 0.0 if value is None else value, where), _ordered(candidates)))
    return predictions


def _pairs(part: Any, where: str) -> list[tuple[Any, Any]]:
    if not isinstance(part, dict):
        raise _malformed(where, "a position's candidates are not an object")
    return list(part.items())


def listed(content: Sequence[Any], where: str) -> list[Prediction]:
    """The newer schema, and llama.cpp's own: a list of {token, logprob, bytes, id, top_logprobs: [{…}]}.

    llama.cpp writes `prob` and `top_probs` for probabilities after its sampler, and before 2025 {content, probs: [{tok_str, prob}]}.

    Raises:
        ServerError: it is not such a list, or contains something other than numbers.
    """
    _bounded(content, where)
    predictions = []
    for entry in content:
        if not isinstance(entry, dict):
            raise _malformed(where, "a position is not an object")
        inner: Any = next((entry[name] for name in ("top_logprobs", "top_probs", "probs") if entry.get(name) is not None), [])
        if not isinstance(inner, list) or not all(isinstance(item, dict) for item in inner):
            raise _malformed(where, "a position's candidates are not a list of objects")
        candidates = [_entry(item, where) for item in inner]
        token = _entry(entry, where, [item.logprob for item in candidates if item.text == entry.get("content")])
        predictions.append(Prediction(token, _ordered(candidates)))
    return predictions


def _entry(item: dict[str, Any], where: str, otherwise: Sequence[float] = ()) -> TokenCandidate:
    text = next((item[name] for name in ("token", "tok_str", "content") if isinstance(item.get(name), str)), None)
    if text is None:
        raise _malformed(where, "a token has no text")
    if item.get("logprob") is not None:
        value = number_of(item["logprob"], where)
    elif item.get("prob") is not None:
        value = _of_probability(item["prob"], where)
    elif otherwise:
        value = otherwise[0]
    else:
        raise _malformed(where, "a token has neither logprob nor prob")
    number, data = item.get("id"), item.get("bytes")
    if isinstance(data, list) and not all(isinstance(byte, int) and 0 <= byte < 256 for byte in data):
        raise _malformed(where, "a token's bytes are not bytes")
    return TokenCandidate(
        text,
        value,
        number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else _numbered(text),
        bytes(data) if isinstance(data, list) else None,
    )


def _candidate(text: Any, value: Any, where: str) -> TokenCandidate:
    return TokenCandidate(str(text), number_of(value, where), _numbered(str(text)))


def _numbered(text: str) -> int | None:
    """The id of a token that the server writes as "token_id:123" (vLLM's return_tokens_as_token_ids)."""
    digits = text.removeprefix("token_id:")
    return int(digits) if digits != text and digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def number_of(value: Any, where: str) -> float:
    """A log-probability as a number; every way to write a probability of 0 gives −∞.

    Positive numbers are kept: `require_logarithms` refuses them where nothing explains them.

    Raises:
        ServerError: it is not a number, or NaN.
    """
    if isinstance(value, str) and value in ("-Infinity", "-inf"):
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and math.isnan(value)):
        raise _malformed(where, f"a log-probability is {_shown(value)}")
    if value > _LARGEST:
        raise _malformed(where, f"a log-probability is {str(value)[:40]}, above 0")
    return -math.inf if value < _NEVER else float(value)


def require_logarithms(candidates: Iterable[TokenCandidate], where: str) -> None:
    """Refuse numbers that cannot be log-probabilities.

    Raises:
        ServerError: one is above 0 by more than rounding.
    """
    above = next((candidate.logprob for candidate in candidates if not may_be_logarithm(candidate)), None)
    if above is not None:
        raise _malformed(where, f"a log-probability is {above:g}, above 0, as if it were a logit")


def may_be_logarithm(candidate: TokenCandidate) -> bool:
    """Whether a number can be a log-probability: it is not above 0 by more than rounding."""
    return candidate.logprob <= _ABOVE


def _shown(value: Any) -> str:
    return f"the text {value[:40]!r}" if isinstance(value, str) else str(value)[:40]


def _of_probability(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 + 1e-3:
        raise _malformed(where, f"a probability is {str(value)[:40]}")
    return min(math.log(value), 0.0) if value > 0 else -math.inf


def _ordered(candidates: Sequence[TokenCandidate]) -> tuple[TokenCandidate, ...]:
    return tuple(sorted(candidates, key=lambda candidate: -candidate.logprob))


def _bounded(entries: Sequence[Any], where: str) -> None:
    if len(entries) > _MOST:
        raise _malformed(where, f"it has {len(entries):,} predictions")


def _malformed(where: str, why: str) -> ServerError:
    return ServerError(f"{where} gives log-probabilities that cannot be read: {why}.", "Check --server-api.")
