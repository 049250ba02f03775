"""Our dumps read back to the bit; what foreign engines print is understood or refused, never a traceback."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from careful import NUMBERS, all_left, fields_of
from dumps import HEADER, random
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from checkpoints.errors import DumpError
from checkpoints.jsonl import Writer
from checkpoints.reading.bulk import BulkParser
from checkpoints.reading.reader import read
from checkpoints.record import Dump, Token
from checkpoints.summary import summarise
from parity.diff.compare import compare

ANY_FLOAT = st.integers(0, 2**32 - 1).map(lambda bits: np.array([bits], dtype=np.uint32).view(np.float32)[0])
NAN, INF = float("nan"), float("inf")
same_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def parsed(folder: Path, text: str | bytes) -> Dump:
    """The dump that this text is."""
    path = folder / "dump.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path)


def line(**fields: object) -> str:
    """A record as a foreign engine prints it."""
    return json.dumps({"checkpoint": "embd", "token_idx": 0, "values": [1.5], **fields}) + "\n"


@pytest.mark.slow
@same_file
@given(st.lists(ANY_FLOAT, min_size=1, max_size=40))
def test_every_float_survives(tmp_path: Path, numbers: list[np.float32]) -> None:
    """All float32 bit patterns, NaN and infinities too, come back as they were (NaN as some NaN)."""
    row = np.array([numbers], dtype=np.float32)
    with Writer(tmp_path / "d.jsonl", HEADER) as writer:
        writer.rows(summarise("embd", row, np.arange(1), slice_size=None))
    dump = read(tmp_path / "d.jsonl").points["embd"].values
    assert np.array_equal(dump, row, equal_nan=True)
    assert np.array_equal(np.signbit(dump[~np.isnan(row)]), np.signbit(row[~np.isnan(row)]))


def test_a_dump_comes_back_whole(tmp_path: Path) -> None:
    """Header, places, shapes, statistics, sketches, tokens and the end record are read as they were written."""
    arrays = random(("embd", "blk.0.l_out"), positions=5)
    rows_of = {name: summarise(name, x, np.arange(5), step=3, decode=True, seq=2) for name, x in arrays.items()}
    token = Token(5, 17, " x", ((17, 1.5), (3, -0.25)), 2)
    with Writer(tmp_path / "d.jsonl", replace(HEADER, tokens=(1, 2), pieces=("a", "b"))) as writer:
        for rows in rows_of.values():
            writer.rows(rows)
        writer.token(token)
    dump = read(tmp_path / "d.jsonl")
    assert dump.header == replace(HEADER, tokens=(1, 2), pieces=("a", "b"))
    assert dump.tokens == (token,)
    assert dump.end is not None
    assert (dump.end.checkpoints, dump.records, dump.notes) == (10, 10, ())
    for name, rows in rows_of.items():
        back = dump.points[name]
        assert (back.shapes, back.decode.all(), set(back.step), set(back.seq)) == (rows.shapes, True, {3}, {2})
        assert np.array_equal(back.values, rows.values)
        assert all(np.array_equal(back.stats[key], column) for key, column in rows.stats.items())
        assert np.array_equal(back.sketch, rows.sketch)  # type: ignore[arg-type]


def test_a_dump_that_was_cut_short_is_used(tmp_path: Path) -> None:
    """A torn last line and a missing end record are said; what is whole counts."""
    with Writer(tmp_path / "d.jsonl", HEADER) as writer:
        writer.rows(summarise("embd", random()["embd"], np.arange(12)))
    text = (tmp_path / "d.jsonl").read_bytes()
    dump = parsed(tmp_path, text[: text.rindex(b'"token_idx":11') + 40])
    assert dump.records == 11
    assert len(dump.notes) == 3


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (line(), [1.5]),
        ('[12:03:11] debug: {"checkpoint":"embd","token_idx":0,"values":[1,2]}\n', [1, 2]),
        (
            '{"checkpoint":"embd","token_idx":0,"values":[nan,-nan,inf,-inf,NaN,Infinity]}\r\n',
            [NAN, NAN, INF, -INF, NAN, INF],
        ),
        ('{"checkpoint":"embd","token_idx":0,"values":["NaN","-Infinity",null]}', [NAN, -INF, NAN]),
        ('{"token_idx":0,"layer":0,"values":[1.000000,-2.500000],"checkpoint":"C0"}\n', [1, -2.5]),
        (line(shape="[1,1,4]"), [1.5]),
        ('{"checkpoint":"embd","token_idx":0,"values":[1e400]}\n', [np.inf]),
        ('{"checkpoint":"nan inf","token_idx":0,"values":[1]}\n' + line(), [1.5]),
    ],
)
def test_foreign_lines(tmp_path: Path, text: str, values: list[float]) -> None:
    """Log prefixes, bare and quoted non-finite words, %f, shapes as text, aliases: all are records."""
    assert np.array_equal(parsed(tmp_path, text).points["embd"].values[0], np.float32(values), equal_nan=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "hello\n",
        "{}\n",
        line(token_idx=-1),
        line(token_idx="0"),
        line(token_idx=1.5),
        line(token_idx=2**50),
        line(checkpoint=5),
        line(values="1,2"),
        line(values=[[1]]),
        line(values=["one"]),
        line(values=[True]),
        line(shape=[0]),
        line(shape=[-3]),
        line(sketch=[1, 2]),
        line(sketch=5),
        line(indices=[1, 2]),
        line(indices=["a"]),
        line(stats={"l2": "large"}),
        line(stats={"sum": 10**400}),
        line(values=[10**400]),
        line(stats=[1]),
        line(step="x"),
        line(seq=-1),
        line(seq=2**60),
        line(step=2**70),
        '{"type":"header","format":2}\n' + line(),
        '{"type":"header","format":1,"tokens":["a"]}\n' + line(),
        '{"type":"header","format":1,"model":7}\n' + line(),
        '{"type":"header","format":1,"slice":"x","tokens":5}\n' + line(),
        '{"type":"token","id":1}\n' + line(),
        '{"type":"end","checkpoints":"many"}\n' + line(),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, text: str) -> None:
    """Broken records are an error of one line that says where."""
    with pytest.raises(DumpError) as caught:
        parsed(tmp_path, text)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = (
    *("type", "checkpoint", "token_idx", "values", "stats", "sketch", "indices", "shape", "step", "seq", "phase", "dtype"),
    *("format", "model", "tokens", "top", "id", "compute", "mode", "prompt", "pieces", "kv_type", "slice", "build"),
)


@pytest.mark.slow
@same_file
@given(
    st.lists(
        st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from(["header", "token", "end", "embd"]), max_size=6),
        max_size=4,
    )
)
def test_no_json_breaks_the_reader(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    """Whatever JSON stands in the lines, reading and comparing end in a result or in an error for the user."""
    text = "".join(json.dumps(fields) + "\n" for fields in [*lines, {"checkpoint": "embd", "token_idx": 0, "values": [1.0]}])
    with suppress(DumpError):
        dump = parsed(tmp_path, text)
        compare(dump, dump)


@same_file
@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(tmp_path: Path, data: bytes) -> None:
    """Any file at all is a dump or an error for the user."""
    with suppress(DumpError):
        parsed(tmp_path, data + b"\n" + line().encode())


ODD = st.sampled_from(
    [
        "NaN",
        '"NaN"',
        "null",
        "-inf",
        "nan(0x7f)",
        "-nan(ind)",
        '"-Infinity"',
        "+inf",
        "iNF",
        '"1.5"',
        '"007"',
        "-1e-999",
        "1e400",
        "0e999",
        "[1]",
        "true",
        "1" + "0" * 30,
        '"x"',
        "{}",
        "01",
        "1 nan",
        "xnan",
        "1_0",
        "+1",
        "1.",
    ]
)
TEXTS = st.sampled_from(
    ['"ts":"2026"', '"note":"a ] \\"values\\": [7]"', '"meta":{"values":[9]}', '"layer":3', '"bad":"\\ud800"']
)


@st.composite
def printed_lines(draw: st.DrawFn) -> str:
    """A line as some engine prints it, short or longer than what is cut; now and then odd."""
    count = draw(st.sampled_from([0, 1, 3, 16, 400]))
    numbers = draw(st.lists(st.sampled_from(NUMBERS), min_size=min(count, 3), max_size=min(count, 3))) * (count // 3 + 1)
    numbers = numbers[:count]
    if draw(st.integers(0, 12)) == 0:
        numbers.append(draw(ODD))
    parts = [
        f'"checkpoint":"{draw(st.sampled_from(["C0", "embd", "layer_3", "logits"]))}"',
        f'"token_idx":{draw(st.sampled_from([0, 1, 2, 7]))}',
        f'"values":{draw(st.sampled_from(["", " "]))}[{",".join(numbers)}]',
        *draw(
            st.lists(TEXTS | st.sampled_from(['"shape":"[1,401]"', '"shape":[401]', '"step":2', '"dtype":null']), max_size=2)
        ),
    ]
    begin = draw(st.sampled_from(["", "", "", "[12:03] x: "]))
    return begin + "{" + ",".join(draw(st.permutations(parts))) + "}" + draw(st.sampled_from(["", "", "\r", "\n", ' {"a":1}']))


@pytest.mark.slow
@same_file
@example([f'{{"checkpoint":"embd","token_idx":0,"values":[{text}]}}' for text in ("", "true", "[1]")])
@given(st.lists(printed_lines(), min_size=1, max_size=8))
def test_many_lines_at_once_give_what_each_gives_alone(tmp_path: Path, lines: list[str]) -> None:
    """The fast way and the careful one read the same values, places, shapes, quanta and skipped lines, or both refuse."""
    text = "\n".join(lines)
    outcomes = []
    for careful in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if careful:
                patch.setattr(
                    BulkParser, "lines", all_left
                )  # an observer of both ways: which one a line takes is nobody's option
            try:
                dump = parsed(tmp_path, text)
            except DumpError as error:
                outcomes.append(str(error))
            else:
                outcomes.append([dump.skipped, dump.torn, *(fields_of(rows) for rows in dump.points.values())])
    assert repr(outcomes[0]) == repr(outcomes[1])


@pytest.mark.parametrize("padding", ["", "p" * 2048], ids=["short", "wide"])
@pytest.mark.parametrize(
    "values",
    [
        '["4"1]',
        '["4"1e-7,2]',
        '[1"2"]',
        '["1""2"]',
        '[-"1"]',
        '[nan("5")]',
        "[1 nan]",
        "[nan 1]",
        "[1e400 2]",
        "[1,,2]",
        "[1,]",
        "[,1]",
        "[[1],2]",
        "[[1]",
        "[1]]",
        "[1nan]",
        "[--1]",
        "[+1]",
        "[01]",
        "[1.]",
        '""',
        "{}",
        "(1)",
    ],
)
def test_no_malformed_list_is_read_as_other_numbers(tmp_path: Path, values: str, padding: str) -> None:
    """Elements that run into each other, empty ones and brackets too many: never a record, in whatever company; wide lines too."""
    company = [f'{{"checkpoint":"C1","token_idx":0,"values":[{x}],"p":"{padding}"}}\n' for x in ("1.5", 'nan,"2"', "1e400")]
    for others in (company[:1], company):
        text = "".join([others[0], f'{{"checkpoint":"C0","token_idx":0,"values":{values},"p":"{padding}"}}\n', *others[1:]])
        try:
            dump = parsed(tmp_path, text)
        except DumpError as error:
            assert "line 2" in str(error)  # noqa: PT017  # it may be refused or skipped
        else:
            assert (dump.records, dump.skipped) == (len(others), 1)


def test_numbers_of_any_length_are_read_beside_words(tmp_path: Path) -> None:
    """A fraction of hundreds of digits, infinite numbers and words may stand in one block: each is read as it is alone."""
    numbers = ["0." + "1" * 400, "1e400", "nan", '"2.5"', "-" + "9" * 30, "1" * 400 + ".5"]
    text = "".join(f'{{"checkpoint":"embd","token_idx":{i},"values":[{number}]}}\n' for i, number in enumerate(numbers))
    expected = np.float32([1 / 9, INF, NAN, 2.5, -1e30, INF])
    assert np.array_equal(parsed(tmp_path, text).points["embd"].values[:, 0], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("printed", "quantum"),
    [
        ("1.500000,-0.000012", [1e-6, 1e-6]),
        ("1.5,0.25,-3", [0.1, 0.01, 0.1]),  # %g: to the same number of significant digits
        ("0.12345678,1.2345678e-05", None),
        ("12.34567,0.1234567", [1e-5, 1e-7]),  # seven digits were rounded for print, eight show everything
        ("12.345678,0.12345678", None),
        ("12.3457,0.00123457,nan", [1e-4, 1e-8, 0]),
    ],
)
def test_printed_digits_set_a_quantum(tmp_path: Path, printed: str, quantum: list[float] | None) -> None:
    """The step of the last printed digit is found for %f and %g, none where nine digits give all; NaN has none."""
    dump = parsed(tmp_path, f'{{"checkpoint":"embd","token_idx":0,"values":[{printed}]}}\n').points["embd"].quantum
    assert (None if dump is None else dump[0].tolist()) == (None if quantum is None else pytest.approx(quantum))


def test_the_quantum_is_of_the_records_own_values(tmp_path: Path) -> None:
    """The digits that are looked at are those of the record, also in a line that is read alone and has other "values" before."""
    text = '{"meta":{"values":[9.000,9]},"checkpoint":"embd","token_idx":0,"indices":[3,5],"values":[nan,1.25]}\n'
    quantum = parsed(tmp_path, text).points["embd"].quantum
    assert quantum is not None
    assert quantum[0].tolist() == [0, 0.01]


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    """What cannot be opened is an error that names it."""
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(DumpError, match="cannot read"):
            read(path)
