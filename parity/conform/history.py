"""A run as an entry of a ledger: `parity drift history FOLDER` then shows which cell came closer to its limit."""

from math import isfinite

from checkpoints.answers.conform import Conformance
from checkpoints.answers.diff import DIVERGENCE, PARITY
from checkpoints.answers.drift import Entry

from ..drift import ledger
from . import identity
from .bench import Settings

SOURCE = "conform"


def noted(conformance: Conformance, settings: Settings, time: str) -> None:
    """Add a finished run to the ledger of its folder. A new build of an engine is compared with earlier ones of the same command.

    Raises:
        InputError: it cannot be written.
    """
    margins = {
        result.cell.name: (result.nmse, result.nmse / result.of_limit if result.of_limit else 0.0, result.of_limit)
        for result in conformance.results
        if result.nmse is not None and result.of_limit is not None and isfinite(result.nmse)
    }
    if not margins:
        return
    commit, dirty = ledger.commit()
    versions = {"source": conformance.side, "program": identity.program()}
    verdict = PARITY if conformance else DIVERGENCE
    entry = Entry(
        time,
        commit,
        verdict,
        f"{SOURCE} {settings.name}",
        identity.digest(conformance.side),
        versions,
        margins,
        {"dirty": dirty},
    )
    ledger.append(settings.folder / ledger.NAME, entry)
