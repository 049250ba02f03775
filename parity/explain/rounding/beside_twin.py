"""A comparison with a native llama.cpp that diverges by the table's limits: what native types cost on this model is measured.

llama.cpp's run on the F32 twin is the measure: the distance of its native run from that one is what its types cost here. A general
table cannot know this: where attention's scores are not scaled, 8-bit activations alone change attention's weights.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.diff import Limits, Pattern
from checkpoints.errors import ParityError
from checkpoints.reading.reader import read
from checkpoints.record import Dump
from reports.numbers import count

from ...diff.compare import Comparison, Options, comparison
from ...diff.limits import EXACT, NATIVE, measured_by_point
from ...diff.tolerances.truth import COARSE_MULTIPLE
from ...run.one_side import dump_reference
from ...run.request import Request

_LLAMA_CPP = "llama.cpp"
Exactly = Callable[[Dump, Dump, Options], Comparison]


def beside_twin(compared: Comparison, ours: Dump, ref: Dump, options: Options, model: Path, exactly: Exactly) -> Comparison:
    """The comparison, judged once more if it is a divergence that the cost of the reference's native types may explain.

    Parity if OURS agrees with llama.cpp on the F32 twin as a float32 engine does: then the whole difference is what native types cost
    llama.cpp. Otherwise a limit that is wide enough for that cost would let faults pass, so the answer is undecided. An error of more
    than `COARSE_MULTIPLE` times the cost remains a divergence.

    Args:
        exactly: compares a dump with one of the twin, by limits of float32.
    """
    if not _may_be_cost(compared, ref, options):
        return compared
    try:
        with TemporaryDirectory(prefix="parity-twin-") as scratch:
            out = Path(scratch) / "twin.jsonl"
            dump_reference(Request(model, mode=EXACT), out, follow=ref)
            twin = read(out)
        cost = comparison(twin, ref, Options(placed=True))
    except ParityError:  # too large for this machine, say: the table's limits remain
        return compared
    allowed = _allowed(compared.verdict.limits, cost)
    within = comparison(ours, ref, replace(options, limits=allowed, truth=None))
    if not within.verdict:
        return compared
    exact = exactly(_as_exact(ours), twin, replace(options, compute="f32"))
    over = {compared.records.names[number] for number in compared.records.point[compared.records.failed].tolist()}
    if exact.verdict and over.issubset(exact.records.names) and not exact.verdict.excused:
        notes = (_of_the_twin(compared), *within.verdict.notes)
        return replace(within, verdict=replace(within.verdict, notes=notes))
    pattern = Pattern(
        "undecided",
        f"no more than {COARSE_MULTIPLE:g} times what the file's types cost llama.cpp on this model and prompt, and not what float32 "
        "gives: a fault, or an engine that rounds activations as llama.cpp does (`parity isolate` judges each operation by its own inputs)",
    )
    return replace(compared, verdict=replace(compared.verdict, pattern=pattern, operation=""))


def _may_be_cost(compared: Comparison, ref: Dump, options: Options) -> bool:
    """Whether records differ from a native llama.cpp's by the table's limits, and tokens do not."""
    header = ref.header
    return (
        not compared.verdict
        and options.tolerance is None
        and options.limits is None
        and not options.strict
        and header is not None
        and (header.mode, header.source) == (NATIVE, _LLAMA_CPP)
        and bool(header.tokens)
        and compared.records.tokens.divergence is None
    )


def _allowed(usual: Limits, cost: Comparison) -> Limits:
    """The limits by point: `COARSE_MULTIPLE` times the worst distance of the native run from the twin's there, never below the table's."""
    records, costs = cost.records, dict[str, float]()
    for number, name in enumerate(records.names):
        errors = records.measures.nmse[records.point == number]
        costs[name] = COARSE_MULTIPLE * float(errors[np.isfinite(errors)].max(initial=0.0))
    source = f"{COARSE_MULTIPLE:g} times what the file's types cost llama.cpp on this model and prompt, by point"
    return measured_by_point(costs, usual, source)


def _as_exact(dump: Dump) -> Dump:
    return dump if dump.header is None else replace(dump, header=replace(dump.header, mode=EXACT))


def _of_the_twin(compared: Comparison) -> str:
    records = compared.records
    over = np.flatnonzero(records.failed)
    worst = over[np.argmax(records.measures.nmse[over])]
    error, name = records.measures.nmse[worst], records.names[records.point[worst]]
    return (
        f"native: {count(len(over), 'record')} over the usual limit, up to {error:.1e} at {name}, position "
        f"{records.token_idx[worst]}: what the file's types cost llama.cpp on this model. Our side agrees with llama.cpp's run on the "
        "F32 twin within the limits of exact mode"
    )
