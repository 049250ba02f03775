"""A file without a single record says what its first line lacks."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
from cli import Cli, refused

RECORD = '{"checkpoint":"C0","token_idx":0,"values":[1]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('log\n{"checkpoint":"C0","token_idx":0,"data":[1,2]}', 'Line 2 lacks "values"; it has checkpoint, token_idx, data.'),
        ('{"checkpoint":"C0","token_idx":0,"values":[1,2,]}', "Line 1 is not JSON: "),
        ("embd 0.1 0.2", "has no checkpoint record in 1 line. No line contains a JSON object. A record is"),
        ('{"\\u001b[31m": 1}', "it has \ufffd[31m."),
        ("{" * 5000, "Line 1 is not JSON: "),
        (f"{RECORD}{RECORD}\n", "Line 1 goes on after its JSON object, at character 46 "),
        (f"[{RECORD},{RECORD}]", "It is one JSON list: "),
        ("[info] loading\n[info] ready", "in 2 lines. No line contains a JSON object. A record is"),
        ('{\n"checkpoint": "embd"\n}\n', "The JSON object of line 1 is spread over several lines."),
    ],
)
def test_what_the_first_line_lacks_is_said(text: str, message: str, parity: Cli) -> None:
    """Another key, a trailing comma, no JSON at all, control characters: exit 2 and one line that names it."""
    Path("ours.jsonl").write_text(text)
    refused(parity("lint", "ours.jsonl"), message)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (RECORD.encode("utf-16"), "UTF-16 text"),
        (RECORD.encode("utf-16-le"), "UTF-16 text"),
        (RECORD.encode("utf-16-be"), "UTF-16 text"),
        (RECORD.encode("utf-32"), "UTF-32 text"),
        (gzip.compress(RECORD.encode()), "compressed with gzip"),
        (lzma.compress(RECORD.encode()), "compressed with xz"),
        (bz2.compress(RECORD.encode()), "compressed with bzip2"),
        (b"\x7fELF\x02\x01\x01\0\0", "not a text file"),
    ],
    ids=["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gzip", "xz", "bzip2", "elf"],  # gzip's bytes hold the time
)
def test_a_file_of_another_kind_is_called_by_its_name(content: bytes, kind: str, parity: Cli) -> None:
    """Other encodings, compressed files and programs are said to be what they are."""
    Path("ours.jsonl").write_bytes(content)
    refused(parity("lint", "ours.jsonl"), f"It is {kind}")
