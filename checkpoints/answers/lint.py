"""The result of linting one dump: pure data. `parity.lint` makes it, `reports` formats it."""

from msgspec import Struct

ERROR = "error"  # no engine can compute this: a comparison would say nothing about the engine
SUSPICION = "suspicion"  # captured wrong, or computed wrong: a comparison decides by what is computed from it
WARNING = "warning"  # suspicious, but an engine may really compute this: a comparison is the judge


class Finding(Struct, frozen=True):
    """One thing that is wrong with a dump.

    `checkpoint` and `token_idx` say where it begins (None: the whole dump); `evidence` is what was seen, `cause` what
    usually causes it, `advice` what to do.
    """

    rule: str
    severity: str
    checkpoint: str | None
    token_idx: int | None
    evidence: str
    cause: str
    advice: str


class LintReport(Struct, frozen=True):
    """All findings of one dump, the most severe first; true if there are none. `notes` are remarks from reading the file."""

    path: str
    records: int
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a comparison of this dump would say anything about the engine."""
        return all(finding.severity != ERROR for finding in self.findings)

    @property
    def suspicions(self) -> tuple[Finding, ...]:
        """Findings for which a comparison has to decide between capture and engine."""
        return tuple(finding for finding in self.findings if finding.severity == SUSPICION)

    def __bool__(self) -> bool:
        return not self.findings
