"""Can this dump be trusted? Runs every rule of `parity.lint.table` over one dump."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from checkpoints.answers.lint import ERROR, SUSPICION, WARNING, Finding, LintReport
from checkpoints.dataflow import Dataflow
from checkpoints.errors import DumpError
from checkpoints.record import Dump

from ..diff.measured.tokens import same_model
from .model_facts import ModelFacts, open_model
from .rule import Rule, Subject
from .table import RULES

_GRAVITY = {ERROR: 0, SUSPICION: 1, WARNING: 2}
# Most findings of one rule that are listed one by one; a fault in every layer would fill the screen.
_SHOWN = 5


def lint(dump: Dump, model: Path | ModelFacts | None = None, dataflow: Dataflow | None = None) -> LintReport:
    """Check one dump, with a model file also by the rules that need it. `dataflow` is that of another dump of the same model.

    Raises:
        ModelError: the model file cannot be read as one. InputError: the dump's header names another one.
    """
    facts = open_model(model) if isinstance(model, Path) else model
    if facts is not None:
        same_model(dump, facts.model.path)
    subject = Subject(dump, facts, dataflow)
    findings = _findings(subject, RULES)
    refused = subject.refused_dataflow
    notes = [f"the header's dataflow is ignored: {refused:.300}"] if refused else []
    return LintReport(dump.path, dump.records, tuple(findings), (*dump.notes, *notes))


def _findings(subject: Subject, rules: Iterable[Rule]) -> list[Finding]:
    """The findings of these rules, the severe ones first."""
    findings: list[Finding] = []
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # garbage is what lint is for
        for rule in rules:
            hits = rule.hits(subject)
            for number, hit in enumerate(hits):
                if number == _SHOWN and len(hits) > _SHOWN + 1:
                    points = sorted({other.checkpoint or "" for other in hits[number:]})
                    rest = f"and {len(hits) - _SHOWN} more like this, at {', '.join(points[:6])}{', …' * (len(points) > 6)}"
                    findings.append(
                        Finding(rule.name, rule.severity, hit.checkpoint, hit.token_idx, rest, rule.cause, rule.advice)
                    )
                    break
                severity = hit.severity or rule.severity
                findings.append(
                    Finding(rule.name, severity, hit.checkpoint, hit.token_idx, hit.evidence, rule.cause, rule.advice)
                )
    findings.sort(key=lambda finding: _GRAVITY[finding.severity])
    return findings


def refuse_unusable(dump: Dump, side: str) -> None:
    """Raise DumpError if lint calls a side of a comparison unusable; the message says which side and why.

    Only the rules that can say so are run: the others take five times as long, and a comparison does not report their findings.
    """
    grave = (rule for rule in RULES if rule.severity == ERROR)
    errors = [finding for finding in _findings(Subject(dump), grave) if finding.severity == ERROR]
    if not errors:
        return
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise DumpError(
        f"{side} ({dump.path}) cannot be trusted: {errors[0].rule}: {errors[0].evidence}{more}.",
        f"Usual cause: {errors[0].cause}. `parity lint {dump.path}` lists everything, --despite-lint compares anyway.",
        code="unusable",
    )
