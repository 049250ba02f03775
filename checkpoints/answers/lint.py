"""What a lint found in one dump: pure data. `parity.lint` makes it, `reports` formats it."""

from dataclasses import dataclass

ERROR = "error"  # no engine can mean this: a comparison would say nothing of the engine
SUSPICION = "suspicion"  # captured wrong, or computed wrong: what is made from it decides, in a comparison
WARNING = "warning"  # suspicious, but an engine may really compute this: a comparison is the judge


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dump.

    `checkpoint` and `token_idx` say where it begins (None: the dump as a whole); `evidence` what was seen, `cause` what
    usually makes it, `advice` what to do.
    """

    rule: str
    severity: str
    checkpoint: str | None
    token_idx: int | None
    evidence: str
    cause: str
    advice: str


@dataclass(frozen=True)
class LintReport:
    """All findings of one dump, the grave ones first; true where there are none. `notes` are what was noticed while reading it."""

    path: str
    records: int
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a comparison of this dump says anything about the engine."""
        return all(finding.severity != ERROR for finding in self.findings)

    @property
    def suspicions(self) -> tuple[Finding, ...]:
        """What a comparison has to decide: the capture or the engine."""
        return tuple(finding for finding in self.findings if finding.severity == SUSPICION)

    def __bool__(self) -> bool:
        return not self.findings
