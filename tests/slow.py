"""Parameters of tests, some of them slow: those run in CI after the quick tests."""

from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


def slow_but(values: Iterable[T], *quick: T) -> list[object]:
    """All values as parameters of a test, those that are not `quick` marked as slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
