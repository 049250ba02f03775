"""The sources that are compiled for a device, as far as they can be looked at without one."""

import pytest

from engine.device import source


@pytest.mark.parametrize("file", ["decode.cu", "prefill.cu", "summary.cu"])
def test_each_header_is_put_in_once(file: str) -> None:
    """No include of ours is left over, and no header comes twice, however many others include it."""
    text = source(file)
    assert '#include "' not in text
    for mark in ("struct Matrix {", "typedef unsigned long long Word;", "struct Shared {"):
        assert text.count(mark) <= 1
    assert "struct Matrix {" in text or file == "summary.cu"
