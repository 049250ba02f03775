"""JUnit XML: one case per point, its figures in the text, so that CI shows which points moved."""

import re
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree as ET

from checkpoints.answers.conform import NO_REFERENCE, REFUSED, UNDECIDED, Conformance, axis
from checkpoints.answers.diff import Difference, PointSummary, Verdict
from checkpoints.answers.drift import Drift

from .conform import outcome
from .drift import remarks as drift_remarks
from .drift import sentence, shortened, shown_margin
from .numbers import error, limit, of_limit, token
from .sentences import answer, headline, reasons, remarks
from .status import status

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 has no way to write


def junit(verdict: Verdict) -> str:
    """One comparison as a test suite."""
    return _written([_suite("parity", verdict)])


def drift_as_junit(drift: Drift) -> str:
    """A check against golden dumps: one suite per prompt, one case per point; growing errors are in the suites' output."""
    suites = []
    for item in drift.checked:
        suite = _suite(f"drift {shortened(item.prompt)}", item.verdict)
        output = [sentence(drift), *(f"{name}: {text}".lstrip(": ") for name, text in drift_remarks(drift))]
        _texted(
            suite,
            "system-out",
            [*output, *(f"{point.checkpoint}: margin {shown_margin(point.margin)}" for point in drift.points)],
        )
        suites.append(suite)
    return _written(suites)


def conform_as_junit(conformance: Conformance) -> str:
    """A conformance run: one suite per architecture, one case per cell; what is refused, undecided or has no reference is skipped."""
    suites = []
    for name in axis(conformance.results, "architecture"):
        results = [result for result in conformance.results if result.cell.architecture == name]
        failures = sum(result.wrong for result in results)
        skipped = [result for result in results if result.verdict in (REFUSED, NO_REFERENCE, UNDECIDED)]
        suite = ET.Element(
            "testsuite", name=_plain(f"conform {name}"), tests=str(len(results)), failures=str(failures), errors="0"
        )
        suite.set("skipped", str(len(skipped)))
        for result in results:
            case = ET.SubElement(suite, "testcase", classname=_plain(name), time=f"{result.seconds:.3f}")
            case.set("name", _plain(f"{result.cell.type} {result.cell.prompt} {result.cell.mode}"))
            if result in skipped:
                ET.SubElement(case, "skipped", message=_plain(outcome(result)))
            elif result.wrong:
                _failure(case, outcome(result), [result.sentence])
            else:
                _texted(case, "system-out", [outcome(result)])
        suites.append(suite)
    return _written(suites)


def _suite(name: str, verdict: Verdict) -> ET.Element:
    cases = [_case(name, verdict, point) for point in verdict.points]
    failures = sum(point.failed > 0 for point in verdict.points)
    never_compared = verdict.uncompared.points
    if not verdict and not failures:  # tokens part, or records are missing: no point of its own failed
        case = ET.Element("testcase", classname=_plain(name), name="alignment")
        _failure(case, headline(verdict), [answer(verdict), *_sentences(verdict)])
        cases.append(case)
        failures = 1
    suite = ET.Element(
        "testsuite", name=_plain(name), tests=str(len(cases) + len(never_compared)), failures=str(failures), errors="0"
    )
    suite.set("skipped", str(len(never_compared)))
    first = verdict.first_divergence
    for case, point in zip(cases, [*verdict.points, None], strict=False):
        if point is not None and first is not None and point.checkpoint == first.checkpoint:
            _texted(case, "system-out", [headline(verdict), *_sentences(verdict)])
        suite.append(case)
    for missing in never_compared:
        case = ET.SubElement(suite, "testcase", classname=_plain(name), name=_plain(missing))
        ET.SubElement(case, "skipped", message="never compared")
    return suite


def _case(suite: str, verdict: Verdict, point: PointSummary) -> ET.Element:
    case = ET.Element("testcase", classname=_plain(suite), name=_plain(point.checkpoint))
    if point.failed:
        differ = f"{point.failed} of {point.records} records differ, {of_limit(point.worst.of_limit)} of the limit"
        message = f"{status(verdict, point)}: {differ}"
        _failure(case, message, _figures(point.worst))
    else:
        _texted(case, "system-out", _figures(point.worst))
    return case


def _figures(difference: Difference) -> Iterable[str]:
    yield f"worst record: position {difference.token_idx} {token(difference.token)}".rstrip()
    yield f"NMSE {error(difference.nmse)}, limit {limit(difference.limit)} ({of_limit(difference.of_limit)})"
    yield f"largest difference {error(difference.max_abs)}"
    if difference.ours or difference.ref:
        yield f"ours {' '.join(f'{x:.9g}' for x in difference.ours)}"
        yield f"ref  {' '.join(f'{x:.9g}' for x in difference.ref)}"


def _sentences(verdict: Verdict) -> list[str]:
    return [f"{name}: {text}" for name, text in (*reasons(verdict), *remarks(verdict))]


def _failure(case: ET.Element, message: str, lines: Iterable[str]) -> None:
    failure = ET.SubElement(case, "failure", message=_plain(message), type="divergence")
    failure.text = _plain("\n".join(lines))


def _texted(parent: ET.Element, name: str, lines: Iterable[str]) -> None:
    child = parent.find(name)
    element = child if child is not None else ET.SubElement(parent, name)
    element.text = "\n".join(filter(None, [element.text, _plain("\n".join(lines))]))


def _written(suites: Sequence[ET.Element]) -> str:
    root = ET.Element("testsuites", name="parity")
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in suites)))
    root.extend(suites)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _plain(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
