"""JSON of a server is bounded in depth before it is parsed."""

import json
import time

import pytest

from parity.server.shallow_json import DEEPEST, shallow_json


@pytest.mark.parametrize("value", [[1.5, "a"], {'a"[': ["[" * 500, "\\"]}, float("inf"), '\\"' * 300 + "{" * 500, None])
def test_shallow_json_is_what_python_reads(value: object) -> None:
    """Brackets, quotes and backslashes inside strings are not nesting."""
    assert shallow_json(json.dumps(value).encode()) == value


def test_depth_is_counted_across_lists_and_objects() -> None:
    """As many levels as are allowed are read, one more is refused, siblings do not add up."""
    siblings = [{"a": []}] * 1_000
    assert shallow_json(json.dumps(siblings).encode()) == siblings
    assert shallow_json(b"[" * DEEPEST + b"]" * DEEPEST)
    for deeper in (b"[" * (DEEPEST + 1), b'{"a":' * (DEEPEST + 1), b'{"a":[' * 200_000):
        with pytest.raises(ValueError, match="levels deep"):
            shallow_json(deeper)


@pytest.mark.parametrize("data", [b"", b'"' + b'\\"' * 2_000_000, b'["', b"\xff", json.dumps([1]).encode("utf-16"), b"]" * 300])
def test_what_is_not_json_is_a_value_error(data: bytes) -> None:
    """Nothing, an unended string of many quotes, another encoding, brackets that only close: refused, in linear time."""
    began = time.monotonic()
    with pytest.raises(ValueError):  # noqa: PT011 - json's, bytes' and its own say different things
        shallow_json(data)
    assert time.monotonic() - began < 30
