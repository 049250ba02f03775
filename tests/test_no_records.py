"""A file without a single record says what its first line lacks."""

from pathlib import Path

import pytest
from cli import Cli


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('log\n{"checkpoint":"C0","token_idx":0,"data":[1,2]}', 'Line 2 lacks "values"; it has checkpoint, token_idx, data.'),
        ('{"checkpoint":"C0","token_idx":0,"values":[1,2,]}', "Line 1 is not JSON: "),
        ("embd 0.1 0.2", "has no checkpoint record in 1 lines. A record is"),
        ('{"\\u001b[31m": 1}', "it has \ufffd[31m."),
        ("{" * 5000, "Line 1 is not JSON: "),
    ],
)
def test_what_the_first_line_lacks_is_said(text: str, message: str, parity: Cli) -> None:
    """Another key, a trailing comma, no JSON at all, control characters: exit 2 and one line that names it."""
    Path("ours.jsonl").write_text(text)
    ran = parity("lint", "ours.jsonl")
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
