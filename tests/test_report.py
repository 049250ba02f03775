"""A comparison as HTML, Markdown, JUnit and annotations: the same facts, and nothing in a dump can break out of them."""

import json
import re
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from cli import Cli
from dumps import dump, noisy, random, spoiled
from msgspec.structs import replace
from pictures import EVIL, diverging, hostile, huge, passing, recorded_otherwise

from checkpoints.answers.diff import AGREES, FRESH, GROWN, INHERITED, OTHERWISE, UNJUDGED, Pattern
from checkpoints.answers.drift import Change, Checked, Drift, Entry, Margin
from checkpoints.answers.explain import Cause, DivergentPlace, Explanation, Named
from checkpoints.errors import InputError
from checkpoints.jsonl import Writer
from checkpoints.record import Dump
from reports.charts import decode, encode, figures
from reports.drift import drift_as_json, lines
from reports.explanation import as_json as explanation_as_json
from reports.findings import ReportSection, finding
from reports.github import annotations, drift_annotations
from reports.history_html import history_html
from reports.html import html
from reports.junit import drift_as_junit, junit
from reports.markdown import drift_as_markdown, markdown


def written(dump_written: Dump, path: Path) -> Path:
    """A dump in memory as a file."""
    assert dump_written.header is not None
    with Writer(path, dump_written.header) as writer:
        for rows in dump_written.points.values():
            writer.rows(rows)
    return path


def test_errors_survive_the_code() -> None:
    """Sixteen bits keep an error to 1 %, and zero, infinite and unknown ones exactly, for all that float32 can differ by."""
    exact = np.array([0.0, np.inf, np.nan])
    assert np.array_equal(decode(encode(exact)), exact, equal_nan=True)
    values = 10 ** np.linspace(-89.9, 89.9, 10_001)
    assert np.max(np.abs(decode(encode(values)) / values - 1)) < 0.01


def test_the_marked_cell_is_the_first_divergence() -> None:
    """The grid's figures decode to the comparison's, and the mark stands on the first divergence."""
    report = diverging()
    drawn = figures(report.verdict, report.picture)
    first = report.verdict.first_divergence
    assert first is not None
    row, column = drawn["mark"]
    assert (
        (drawn["grid"]["points"][row], drawn["grid"]["positions"][column])
        == (first.checkpoint, first.token_idx)
        == ("blk.5.l_out", 3)
    )
    assert first.nmse == report.picture.grid.nmse[row, column]


def test_html_says_it_in_order() -> None:
    """Verdict, first divergence, heat map, errors along the model, text of both sides, how it was run: in this order."""
    text = html(diverging())
    body = text[text.index("<body") :]
    parts = ("<h1>divergence at blk.5.l_out", "First divergence", "Every record", "Error along the model", "Generated text",
             "How it was run")  # fmt: skip
    places = [body.index(part) for part in parts]
    assert places == sorted(places)
    assert "First differing choice at position 12" in text
    assert "<h1>parity</h1>" in html(passing())


def test_html_begins_with_what_is_compared() -> None:
    """Model and both sides stand above the first section, so that a report that was sent around says what it is about."""
    text = html(passing())
    head = text[text.index("<header>") : text.index("</header>")]
    assert [name for name in ("model", "ours", "reference") if f"<dt>{name}</dt>" in head] == ["model", "ours", "reference"]
    assert head.count("engine · f32 · KV f32") == 2


def test_a_legend_for_what_is_not_judged() -> None:
    """Grey is explained where a point was recorded otherwise or cannot be judged, and nowhere else."""
    assert "grey is not judged" in html(recorded_otherwise())
    assert "grey is not judged" in html(recorded_otherwise(UNJUDGED))
    assert "grey is not judged" not in html(passing())


def test_every_status_has_a_colour_and_a_symbol() -> None:
    """A point whose status a chart does not know would not be drawn."""
    script = files("reports").joinpath("templates", "report.js").read_text("utf-8")
    for table in ("inks", "symbols"):
        known = re.search(rf"const {table} = {{(.*)}};", script)
        assert known
        assert set(re.findall(r'"?\b([a-z ]+)"?: "', known[1])) == {AGREES, FRESH, INHERITED, GROWN, OTHERWISE, UNJUDGED}


@pytest.mark.parametrize("make", [passing, diverging, hostile, huge])
def test_html_asks_nothing_of_the_network(make) -> None:  # type: ignore[no-untyped-def]
    """No attribute of the document names another address, and it stays under 3 MB."""
    text = html(make())
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href|action)\s*=\s*(?!["']?data:)""", markup)
    assert "url(" not in markup
    assert len(text.encode()) < 3_000_000


def test_scripts_in_dumps_are_text() -> None:
    """A script in every string of a dump stands nowhere unescaped, in no format."""
    report = hostile()
    assert EVIL not in html(report)
    assert "&lt;script&gt;" in html(report)
    assert EVIL not in re.sub(r"`+[^`]*`+", "", markdown(report))
    ET.fromstring(junit(report.verdict))


def test_markdown_has_the_same_facts() -> None:
    """Markdown names the place, both sides, the points and the differing choice; its tables are whole."""
    report = diverging()
    text = markdown(report)
    for part in (
        "## divergence at blk.5.l\\_out, position 3",
        "### First divergence",
        "jumps here",
        "### Generated text",
        "**differs**",
    ):
        assert part in text
    widths: list[int] = []
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (cells and widths and widths[-1]) or cells == widths[-1]
        widths.append(cells)


def test_the_terminal_has_what_stands_beside_the_verdict() -> None:
    """Both sides' distributions, other commands' answers and the first differing choice stand in the terminal too, cleaned."""
    from reports.beside import lines as beside

    included = finding(
        {"operations": [{"operation": "q", "layer": 0, "status": "wrong", "nmse": 1.0, "reason": EVIL}]}, "iso.json"
    )
    shown = [line.plain for line in beside(replace(diverging(), findings=(included,)), 80)]
    text = "\n".join(shown)
    assert "spread" in text
    assert "elements" in text
    assert included.title in text
    assert "\x1b" not in text
    assert list(beside(passing(), 80)) == []


def test_junit_has_a_case_a_point() -> None:
    """One case a point with its figures; the failed ones are failures, counted right."""
    report = diverging()
    root = ET.fromstring(junit(report.verdict))
    cases = list(root.iter("testcase"))
    assert [case.get("name") for case in cases] == [point.checkpoint for point in report.verdict.points]
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    assert failed == [point.checkpoint for point in report.verdict.points if point.failed]
    assert root.get("failures") == str(len(failed))
    assert "NMSE" in (cases[0].findtext("system-out") or "")
    lacking = replace(report.verdict, points=(), first_divergence=None, verdict="divergence")
    assert ET.fromstring(junit(lacking)).get("failures") == "1", "a divergence without a failed point is a failure, too"


def test_xml_has_no_forbidden_character() -> None:
    """Control characters in names don't make XML that no parser takes."""
    verdict = diverging().verdict
    named = replace(verdict.points[0], checkpoint="\x00\x1b[31m<&\ud800")
    ET.fromstring(junit(replace(verdict, points=(named,))))


def test_an_annotation_is_one_line() -> None:
    """A line break, a colon or a percent sign in a name can't end GitHub's command or start another."""
    verdict = diverging().verdict
    first = verdict.first_divergence
    assert first is not None
    pattern = Pattern("odd", "100% wrong\r\n::error::c")
    evil = replace(verdict, first_divergence=replace(first, token="a\n::error::b%"), pattern=pattern)
    lines = list(annotations(evil))
    assert len(lines) == 1
    assert not {"\n", "\r"} & set(lines[0])
    assert "100%25 wrong" in lines[0]
    assert lines[0].startswith("::error title=divergence at blk.5.l_out%2C position 3")
    assert next(annotations(passing().verdict)).startswith("::notice")


def drift_of(verdict) -> Drift:  # type: ignore[no-untyped-def]
    """A check of one prompt with a change of versions and a finding."""
    points = tuple(Margin(p.checkpoint, p.worst.nmse, p.worst.limit, p.worst.of_limit, before=1e-3) for p in verdict.points)
    return Drift(
        "golden", "ours", (Checked("a | prompt\n", verdict),), points, (Change("llama_cpp", "1", "2"),), ("logits grow",)
    )


def test_drift_in_every_format() -> None:
    """A check says its verdict, the changed version, what grows and the margins, as text, JSON, Markdown, JUnit and annotations."""
    for report in (passing(), diverging()):
        drift = drift_of(report.verdict)
        text = "\n".join(line.plain for line in lines(drift, 100))
        for rendered in (text, markdown_of(drift), drift_as_junit(drift), "\n".join(drift_annotations(drift))):
            assert "llama" in rendered
            assert "grow" in rendered
        ET.fromstring(drift_as_junit(drift))
        assert ("no drift" in text) == bool(drift)
        answer = json.loads(json.dumps(drift_as_json(drift), allow_nan=False))
        assert answer["verdict"] == report.verdict.verdict
        assert all(point["margin"] is None or point["margin"] > 0 for point in answer["points"])


def test_what_was_not_stated_is_called_so() -> None:
    """A fact that one of two checks lacks is "not stated", not an empty place in the sentence."""
    drift = replace(drift_of(passing().verdict), changes=(Change("compute", "", "f32"), Change("build", "a", "")))
    text = "\n".join(line.plain for line in lines(drift, 100))
    assert "compute was not stated, is now f32" in text
    assert "build was a, is now not stated" in text


def markdown_of(drift: Drift) -> str:
    """Markdown with its escapes taken out, to be searched."""
    return drift_as_markdown(drift).replace("\\", "")


def test_diff_writes_what_is_asked_for(parity: Cli, tmp_path: Path) -> None:
    """`parity diff` with --html, --junit and each --format: files are written, the exit code is the verdict's."""
    right = random()
    ref = written(dump(right), tmp_path / "ref.jsonl")
    ours = written(dump(spoiled(right, ("logits",), [4])), tmp_path / "ours.jsonl")
    lint = tmp_path / "lint.json"
    lint.write_text(json.dumps({"usable": False, "findings": [{"severity": "error", "rule": "same-vector"}]}), encoding="utf-8")
    ran = parity("diff", ours, ref, "--html", "r.html", "--junit", "r.xml", "--include", lint)
    assert ran.code == 1
    assert "same-vector" in Path("r.html").read_text(encoding="utf-8")
    ET.parse("r.xml")
    assert parity("diff", ours, ref, "--format", "markdown").out.startswith("## divergence at logits")
    assert parity("diff", ours, ref, "--format", "junit").out.startswith("<?xml")
    assert "::error" in parity("diff", ours, ref, "--format", "github").out
    assert parity("diff", ref, ref, "--format", "markdown").code == 0
    bad = parity("diff", ours, ref, "--html", "r.xml/r.html")
    assert (bad.code, bad.err.count("\n")) == (2, 1)
    assert parity("diff", ours, ref, "--include", ours).code == 2


def test_answers_of_other_commands_become_parts() -> None:
    """isolate, lint and explain answers as the design gives them; anything else is refused."""
    isolate = finding(
        {"operations": [{"operation": "q", "layer": n, "status": "proven", "nmse": 1e-13} for n in range(3)]
         + [{"operation": "k", "layer": 1, "status": "wrong", "nmse": 0.5}]}, "f")  # fmt: skip
    assert isolate.sentence.startswith("3 of 4 operations proven")
    assert isolate.rows[0][:3] == ("k", "1", "wrong")
    explain = finding(
        {"causes": [{"fault": "rope-pairs", "layers": [1, 2], "explained": 1.0, "equivalent": [{"fault": "x"}]}]}, "f"
    )
    assert explain.rows[0][2:4] == ("1–2", "100 %")
    assert explain.rows[1][0] == "x"
    assert "trusted" in finding({"usable": True, "findings": []}, "f").sentence
    for wrong in ({}, [], {"findings": 3}, {"causes": [1]}):
        with pytest.raises(InputError):
            finding(wrong, "f")


@pytest.mark.parametrize("known", [True, False])
def test_an_explanation_is_no_isolation(known: bool) -> None:
    """What `explain` really answers, which lists operations as well as causes, becomes the part on causes, also where it lists none."""
    place = DivergentPlace("blk.0.l_out", 0, 1e-5, 1e-10)
    cause = Cause(Named("rope-pairs", {}, None, "RoPE rotates the wrong pairs"), 1.0, 3, 1e-13, "", "", "")
    explanation = Explanation(3, 3, place, None, causes=(cause,) if known else ())
    section = finding(explanation_as_json(explanation), "f")
    assert section.title == "Which known fault is it?"
    assert [row[:2] for row in section.rows] == [("rope-pairs", "RoPE rotates the wrong pairs")] * known


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"law": "every element is 1.002 times the right one"},
            "no known fault reproduces these numbers; at logits every element is",
        ),
        ({"looks_like": "f16"}, "the numbers look like f16"),
        ({"causes": 1}, "1 cause found; logits is not explained"),
        ({"remaining": None, "precision_only": "f16"}, "no fault: what differs is what f16 rounds"),
        ({"remaining": None, "first": None}, "no fault: nothing differs"),
    ],
)
def test_the_part_on_causes_says_what_explain_says(changes: dict[str, object], sentence: str) -> None:
    """A law and what is left stand in the report, and a right engine is not said to have numbers of an unknown fault, as it was."""
    place = DivergentPlace("logits", 0, 1e-5, 1e-10)
    cause = Cause(Named("rope-pairs", {}, None, "RoPE rotates the wrong pairs"), 0.5, 3, 1e-13, "", "", "")
    causes = (cause,) if changes.get("causes") else ()
    explanation = replace(Explanation(3, 3, place, None, remaining=place), **{**changes, "causes": causes})
    assert sentence in finding(explanation_as_json(explanation), "f").sentence


def test_a_noisy_side_is_right() -> None:
    """The helper that makes right sides makes right sides: else nothing here would prove anything."""
    assert passing().verdict
    assert not diverging().verdict
    assert noisy(random())["embd"].shape == (12, 64)


def test_a_report_of_three_sides_is_headed_by_their_verdict() -> None:
    """Two sides that agree beside a third that does not are no parity: the page says who is alone, in red."""
    section = ReportSection(
        "Three sides", "x", verdict=("divergence at logits: ours and llama.cpp agree exactly, hf is alone", False)
    )
    page = html(replace(passing(), findings=(section,)))
    assert "<h1>divergence at logits: ours and llama.cpp agree exactly, hf is alone</h1>" in page
    assert '<body class="wrong">' in page


def test_margins_are_not_called_steady_where_the_last_check_failed() -> None:
    """A side whose last check is a divergence is named at the top; where all passed and nothing grows, that is said."""
    points = {"logits": (1e-12, 1e-9, 1e-3)}
    checks = [
        Entry("2026-11-01T00:00:00+00:00", "", verdict, "exec", "f00d", points=points) for verdict in ("parity", "divergence")
    ]
    failed = history_html(checks, [])
    assert "<h1>Margins over commits: beyond the limit at the last check</h1>" in failed
    assert "<p>an external engine against golden dumps f00d</p>" in failed
    assert "<h1>Margins over commits: nothing grows</h1>" in history_html(checks[:1], [])
