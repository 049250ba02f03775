"""Lines through the two readers: many at once, and each alone. Run: python benchmarks/fuzz.py readers [-n 100000] [--first SEED]

Every text must be read the same by both, to the bit, or refused by both. Seeded: lists of numbers, words and
what is neither, with separators, brackets and quotes out of place; fields of every kind and wrong type, twice, in escapes; bytes
put in and taken out; short lines and long ones; headers among them. What is read is also held to Python's own JSON where it
understands the line.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
from careful import NUMBERS, all_left, fields_of

from checkpoints.errors import DumpError
from checkpoints.reading.bulk import BulkParser
from checkpoints.reading.reader import read

Draw = random.Random
_WORDS = "NaN|nan|-nan|+nan|NAN|nan(0x7f)|-nan(ind)|nan(|nan()|inf|-inf|+inf|Infinity|-Infinity|INF|infinit|null|Null|NULL"
_QUOTED = '"NaN"|"nan"|"inf"|"-inf"|"+inf"|"Infinity"|"null"|"1.5"|"-2"|"1e5"|"007"|"+1"|" 1"|"1 "|""|"x"|"0x10"|"1_0"|"nan(1)"'
_ALMOST = (
    "true|false|[]|{}|[1]|[[1]]|01|-01|1.|.5|+1|-.5|-|+|.|e|1e|1e+|e5|--1|1-1|1_0|0x10|1f|1.5.2|1e5e5|1e1.5|1nan|nan1|1 nan|1 2"
)
_RUN_TOGETHER = r'"4"1|1"4"|"4""5"|"4 5"|"4,5"|"4]"|"[4"|\'4\'|"\u0034"|"\""|"\\"|"4|4"|"nan"1|1"nan"|"1"e5|-"1"'
_OTHER_BYTES = "\u0663|\uff11|\ufeff1|\xa0|\x00|\x0b|1\x00|1\x0c"
_LARGE = "1e400|-1e400|1e-400|0e999|1e99999999999999999999|18446744073709551615|18446744073709551616|-9223372036854775809"
_LONGNUMBERS = (
    "1" + "0" * 30,
    "0." + "1" * 400,
    "9" * 400,
    "1" * 25 + ".5",
    "-" + "9" * 20,
    "1e" + "0" * 30 + "5",
    f"0.{0:0320}1",
)
_LISTS = (_WORDS, _QUOTED, _ALMOST, _RUN_TOGETHER, _OTHER_BYTES, _LARGE)
_ODD = [*(element for listed in _LISTS for element in listed.split("|")), *_LONGNUMBERS]
_SEPARATORS = [",", ",", ",", ", ", " ,", ",\t", " , ", ",,", " ", "", ";", ",\r", "\t", "],[", "\u00a0,", ", ,"]
_INTEGERS = [
    "0",
    "1",
    "7",
    "-1",
    "1.0",
    "1e0",
    '"1"',
    "true",
    "null",
    "1099511627775",
    "1099511627776",
    "[]",
    "01",
    "4194304",
    "nan",
]
_BYTES = [*b'"[]{},:\\ \t\r\0nNiI-+.eE019xu/', 0x80, 0xC3, 0xEF, 0xFF, 0x0C, 0x1F, 0x7F]
_LONG = 2100  # characters from which the values of a line are cut out before it is parsed


def numbers(draw: Draw, odd: float) -> str:
    """The text of a list, right or not."""
    count = draw.choice((0, 1, 1, 2, 3, 16, 32, 400))
    few = [draw.choice(NUMBERS) for _ in range(min(count, 4))]
    elements = (few * (count // max(len(few), 1) + 1))[:count]
    while elements and draw.random() < odd:
        elements[draw.randrange(len(elements))] = draw.choice(_ODD)
    separators = [","] * (len(elements) - 1)
    if separators and draw.random() < odd / 2:
        separators[draw.randrange(len(separators))] = draw.choice(_SEPARATORS)
    elif separators and draw.random() < 0.1:
        separators = [draw.choice((", ", " , ", ",\t"))] * len(separators)
    inside = "".join(part for pair in zip(elements, [*separators, ""], strict=False) for part in pair)
    begin, end = (
        ("[", "]")
        if draw.random() > odd / 4
        else (draw.choice(("[[", "", "(", "[ ", "{", "[,", '"[')), draw.choice(("]]", "", "]", ",]", "}")))
    )
    return begin + inside + end


def statistics(draw: Draw) -> str:
    """An object of statistics, of which some are others' own."""
    names = draw.sample(["n", "sum", "l2", "min", "max", "nonfinite", "absmax_at", "own", "values"], draw.randrange(5))
    return "{" + ",".join(f'"{name}":{draw.choice((*NUMBERS, *_ODD[:12]))}' for name in names) + "}"


def fields(draw: Draw, odd: float) -> list[str]:
    """The fields of a record, in any order."""
    name = draw.choice(
        ('"C0"', '"C0"', '"embd"', '"layer_3"', '"logits"', '"C\\u0030"', '"h\\n"', '"\\ud800"', '"é"', "null", "7", '""')
    )
    key = draw.choice(('"values"',) * 12 + ('"val\\u0075es"', '"Values"', '"values" ', "values"))
    fields = [
        f'"checkpoint":{name if draw.random() < odd else chr(34) + draw.choice(("C0", "embd", "layer_3")) + chr(34)}',
        f"{key if draw.random() < odd else chr(34) + 'values' + chr(34)}:{numbers(draw, odd)}",
    ]
    if draw.random() < 0.9:
        fields.append(f'"token_idx":{draw.choice(_INTEGERS) if draw.random() < odd else draw.randrange(4)}')
    optional = [
        lambda: f'"seq":{draw.choice(_INTEGERS)}',
        lambda: f'"step":{draw.choice(_INTEGERS)}',
        lambda: (
            '"shape":'
            + draw.choice(
                (
                    "[400]",
                    '"[1,400]"',
                    "[1,1,400]",
                    "[1]",
                    "[]",
                    "null",
                    '"x"',
                    "[400.0]",
                    "[true]",
                    "[-1]",
                    "[9999999999999]",
                    '""',
                    "7",
                    '"400x2"',
                    "[[400]]",
                    "{}",
                    "[1" + ",1" * 20 + "]",
                )
            )
        ),
        lambda: '"phase":' + draw.choice(('"decode"', '"prefill"', "null", "7", '"x"')),
        lambda: '"dtype":' + draw.choice(('"f16"', "null", "7", '"\\u0066"', "[]")),
        lambda: (
            '"stats":' + draw.choice((statistics(draw), "null", "[]", "7", '{"sum":"x"}', '{"sum":[1]}', '{"sum":true}', "{}"))
        ),
        lambda: (
            '"sketch":'
            + draw.choice(("[" + "0.5," * 31 + draw.choice((*NUMBERS, *_ODD[:20])) + "]", numbers(draw, odd), "null", '"x"'))
        ),
        lambda: '"indices":' + draw.choice(("[0]", "[0,2]", "[1,1]", "null", "[-1]", "[0.0]", "[]", "x", '"0"', "[1,0,5]")),
        lambda: '"quantum":' + draw.choice(("0.1", "[0.1]", "null", "-1", "nan", "[0,0]", '"x"', "1e400", "0")),
        lambda: '"type":' + draw.choice(('"checkpoint"', "null", '"header"', '"token"', '"end"', '"x"', "7")),
        lambda: draw.choice(
            (
                '"ts":"2026"',
                '"note":"a ] \\"values\\": [7]"',
                '"meta":{"values":[9]}',
                '"bad":"\\ud800"',
                '"x":[{"checkpoint":"no"}]',
                '"y":"\t"',
                '"n":nan',
                '"w":"nan, inf"',
                '"":0',
                '"\\u0000":0',
                '"z":1e999',
                '"big":' + "9" * 400,
                '"v":"]"',
                '"u":"["',
                '"q":"\\\\"',
            )
        ),
        lambda: f'"values":{numbers(draw, odd)}',
        lambda: '"checkpoint":"C1"',
        lambda: '"token_idx":3',
    ]
    fields += [draw.choice(optional)() for _ in range(draw.choice((0, 0, 0, 0, 1, 1, 2)))]
    if draw.random() < 0.3:
        fields.append(f'"p":"{"p" * _LONG}"')
    draw.shuffle(fields)
    return fields


def line(draw: Draw) -> bytes:
    """One line: a record, most of the time."""
    odd = draw.choice((0.0, 0.0, 0.0, 0.05, 0.3))
    if draw.random() < 0.04:
        return draw.choice(
            (
                b"",
                b"   ",
                b"llama_model_load: {x}",
                b"{}",
                b"[]",
                b"null",
                b"{",
                b"}",
                b'{"type":"header","source":"x","tokens":[1,2]}',
                b'{"type":"end","checkpoints":3}',
                b'{"type":"token","token_idx":1,"id":2}',
                b'{"type":"token","token_idx":-1,"id":2}',
                b'{"a":1} {"b":2}',
            )
        )
    text = "{" + draw.choice((",", ",", ",", ", ")).join(fields(draw, odd)) + "}"
    text = (
        draw.choice(("", "", "", "", "", "", "[12:03] x: ", "\ufeff", " ", "{x} ", "[")) + text if draw.random() < 0.3 else text
    )
    text += draw.choice(("\r", " ", ' {"a":1}', ",", "}", "\0", "]", " x")) if draw.random() < 0.15 else ""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw.choice((0, 0, 0, 0, 1, 1, 2)) if odd else 0):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(3)
        if kind == 0:
            data.insert(at, draw.choice(_BYTES))
        elif kind == 1:
            del data[at : at + draw.choice((1, 1, 2, 8))]
        elif at < len(data):
            data[at] = draw.choice(_BYTES)
    return bytes(data).replace(b"\n", b" ")


def answer(path: Path) -> list[str]:
    """What a reader makes of a file: its error, or everything that it holds."""
    try:
        dump = read(path)
    except DumpError as error:
        return ["refused", str(error)]
    return [
        "read",
        str((dump.skipped, dump.torn, dump.header, dump.tokens, dump.end, dump.notes)),
        *(repr(fields_of(rows)) for rows in dump.points.values()),
    ]


def wrong_values(text: bytes, path: Path) -> str:
    """How what was read of one line differs from Python's JSON; empty where it does not, or Python does not take the line."""
    try:
        record = json.loads(text)
        expected = np.array([float("nan") if x is None else float(x) for x in record["values"]], np.float64)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return ""
    path.write_bytes(text + b"\n")
    try:
        dump = read(path)
    except DumpError:
        return ""
    rows = next(iter(dump.points.values()))
    with np.errstate(over="ignore"):
        values, held = rows.values[0][: rows.counts[0]], expected.astype(np.float32)
    return (
        ""
        if np.array_equal(values, held, equal_nan=True)
        else f"read as {values[:8].tolist()}, Python reads {held[:8].tolist()}"
    )


def main(arguments: list[str]) -> None:
    """Print the table and the failures; exit 1 where there was one."""
    parser = argparse.ArgumentParser(prog="fuzz.py readers")
    parser.add_argument("-n", type=int, default=100_000, help="lines")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args(arguments)
    answers: Counter[str] = Counter()
    failures: list[str] = []
    seed, lines = given.first, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.jsonl")
        while lines < given.n:
            draw = random.Random(f"readers {seed}")
            texts = [line(draw) for _ in range(draw.choice((1, 1, 1, 2, 2, 5)))]
            path.write_bytes(b"\n".join(texts) + draw.choice((b"\n", b"\n", b"")))
            try:
                together = answer(path)
                with patch.object(BulkParser, "lines", all_left):
                    alone = answer(path)
                answers[together[0]] += 1
                if together != alone and (together[0], alone[0]) != ("refused", "refused"):  # one may name another line first
                    failures.append(f"{seed}: {together!s:.300}\n   alone: {alone!s:.300}")
                elif together[0] == "read":
                    failures += [f"{seed}: {wrong}" for text in texts if (wrong := wrong_values(text, path))]
            except Exception as error:
                failures.append(f"{seed}: {type(error).__name__}: {error!s:.200}")
            lines += len(texts)
            seed += 1
    print("| texts | lines | read | refused | read in two ways |")
    print("|---" * 5 + "|")
    print(f"| {seed - given.first:,} | {lines:,} | {answers['read']:,} | {answers['refused']:,} | {len(failures)} |")
    print("\n".join(failures[:20]))
    sys.exit(bool(failures))
