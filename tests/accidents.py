"""What can happen to a file: bytes, lines, numbers and words changed, formats mixed. Seeded by the `random.Random` that is given."""

import io
import random
import zipfile

NUMBERS = [
    *(
        b"1e400",
        b"-1e-400",
        b"NaN",
        b"nan",
        b"-inf",
        b"Infinity",
        b"null",
        b"true",
        b"-0",
        b"1e38",
        b"3.5e38",
        b"0x10",
        b"1_000",
    ),
    *(
        b"18446744073709551616",
        b"-9223372036854775809",
        b"9007199254740993",
        b"1099511627776",
        b"4294967296",
        b"-1",
        b"1.5",
        b'"7"',
    ),
    *(b"9" * 400, b"0." + b"3" * 5000, b"1" + b"0" * 20_000, b"[1]", b"{}", b'"\\ud800"', b"1e", b"--1", b"\xd9\xa3"),
]


def mutated(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """The data after one to four accidents."""
    for _ in range(draw.randint(1, 4)):
        data = draw.choice(ACCIDENTS)(data, draw, others)
    return data[: 1 << 20]


def archived(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """An archive with a spoiled member and right checksums, half of the time; else nothing."""
    if not data.startswith(b"PK") or draw.random() < 0.5:
        return b""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as spoiled:
        names = archive.namelist()
        chosen = draw.choice((0, draw.randrange(len(names))))  # the first describes the others, where any does
        for number, name in enumerate(names):
            spoiled.writestr(name, mutated(archive.read(name), draw, others) if number == chosen else archive.read(name))
    return buffer.getvalue()


def _flip(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _i in range(draw.choice((1, 1, 3, 30)) if data else 0):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _cut(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _drop(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[at + draw.choice((1, 2, 10, 1000)) :]


def _insert(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    at = draw.randrange(len(data) + 1)
    put = draw.choice(
        (b"\0", b"\xff\xfe", b"\n", b"\r", b'"', b"[" * 3000, b"{" * 5, b'{"a":' * 2000, b"]", b"\\", b" " * 100, b"[...,")
    )
    return data[:at] + put + data[at:]


def _number(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    """One number becomes another, or something that is none."""
    places = [i for i in range(1, len(data)) if data[i : i + 1].isdigit() and not data[i - 1 : i].isalnum()]
    if not places:
        return data
    at = end = draw.choice(places)
    while end < len(data) and data[end : end + 1] in b"0123456789.eE+-":
        end += 1
    return data[:at] + draw.choice(NUMBERS) + data[max(end, at + 1) :]


def _lines_moved(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    """A line doubled, removed, or put elsewhere."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    taken = lines.pop(draw.randrange(len(lines)))
    for _i in range(draw.choice((0, 1, 2, 3))):
        lines.insert(draw.randrange(len(lines) + 1), taken)
    return b"".join(lines)


def _word(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    """A quoted word, a key or a text, becomes another."""
    parts = data.split(b'"')
    if len(parts) < 3:
        return data
    words = (
        b"checkpoint",
        b"values",
        b"header",
        b"end",
        b"token",
        b"logits",
        b"blk.999999.q",
        b"",
        b"sketch",
        b"indices",
        b"\xff",
        b"seq",
    )
    parts[draw.randrange(len(parts) // 2) * 2 + 1] = draw.choice(words)
    return b'"'.join(parts)


def _mixed(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A piece of another format in the middle."""
    other = draw.choice(others)
    begin, at = draw.randrange(len(other) + 1), draw.randrange(len(data) + 1)
    return data[:at] + other[begin : begin + draw.choice((50, 500, 5000))] + data[at:]


ACCIDENTS = (_flip, _cut, _drop, _insert, _number, _number, _number, _lines_moved, _word, _mixed)
