"""A header that states a lower arithmetic, and numbers that contradict it: a whole layer agrees as in float32, where that would show."""

from collections.abc import Mapping

from msgspec.structs import replace

from checkpoints.points import parse
from checkpoints.record import Dump
from reports.sentences import ARITHMETIC

from ...diff.compare import Comparison, Options
from ...diff.limits import EXACT_FLOOR
from ...diff.measured.records import Records
from ..records.records import Floats
from .arithmetic import of_unknown_arithmetic
from .known_model import KnownModel
from .precision import LOWER, mean_cost

CONTRADICTED = "the header states "  # the beginning of the note that says so


def unless_in_float32(
    compared: Comparison, ours: Dump, ref: Dump, options: Options, known: KnownModel, stated: str
) -> Comparison:
    """The comparison by what the stated arithmetic costs, or a divergence by what the numbers are, if these are not of that arithmetic.

    `diff` without the model judges so too: what is behind layers that agree as in float32 is not the noise of a lower arithmetic.
    Whoever gives --compute allows for that arithmetic everywhere, in an engine that has it in one part, say.
    """
    cost = known.floor(stated)
    if not compared.verdict or cost is None or known.case is None or ours.header is None or options.compute is not None:
        return compared
    point = _in_float32(compared.records, dict(zip((entry.point for entry in known.case.entries), cost.products, strict=True)))
    if not point:
        return compared
    again = of_unknown_arithmetic(
        replace(ours, header=replace(ours.header, compute="")), ref, replace(options, compute=None), known
    )
    if again.verdict:
        return compared
    note = f"{CONTRADICTED}{ARITHMETIC[stated]}, but {point} agrees as in float32, where that would show: judged as unstated"
    return replace(again, verdict=replace(again.verdict, notes=(note, *again.verdict.notes)))


def _in_float32(records: Records, costs: Mapping[str, Floats]) -> str:
    """The first layer's output, if it agrees as in float32 though rounded products, by these costs, would show there; else "".

    A right engine's error was never below a 300th of what rounded products cost (`precision.LOWER`).
    """
    for number, name in enumerate(records.names):
        if parse(name).kind == "l_out" and name in costs:
            agrees = (records.measures.nmse[records.point == number] <= EXACT_FLOOR.operations).all()
            return name if agrees and mean_cost(costs[name]) * LOWER > EXACT_FLOOR.operations else ""
    return ""
