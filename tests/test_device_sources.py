"""The sources that are compiled for a device, as far as they can be checked without one."""

import re
from importlib.resources import files

import pytest

from engine.device import source

KERNELS = files("engine").joinpath("kernels")


def included(file: str) -> set[str]:
    """The headers of ours that a file includes, itself or through another one."""
    direct = re.findall(r'^#include "(.+)"$', KERNELS.joinpath(file).read_text(encoding="utf-8"), re.MULTILINE)
    return set(direct).union(*map(included, direct))


@pytest.mark.parametrize("file", ["decode.cu", "prefill.cu", "summary.cu"])
def test_each_header_is_put_in_once(file: str) -> None:
    """Every header that a source needs is in the text once, however many others include it, and no include is left over."""
    text = source(file)
    assert '#include "' not in text
    headers = included(file)
    assert headers
    for header in headers:
        longest = (
            max(KERNELS.joinpath(header).read_text(encoding="utf-8").split("#include"), key=len).partition("\n")[2].strip()
        )
        assert len(longest) > 200, header
        assert text.count(longest) == 1, header
