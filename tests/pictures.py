"""Reports made of arrays, for tests of what is written and drawn."""

import numpy as np
from dumps import HEADER, dump, noisy, random, spoiled
from msgspec.structs import replace

from checkpoints.answers.diff import (
    AGREES,
    DIVERGENCE,
    FRESH,
    INHERITED,
    OTHERWISE,
    Difference,
    Limits,
    Origin,
    PointSummary,
    Verdict,
)
from checkpoints.answers.picture import Grid, Picture, Spread
from checkpoints.points import all_points, parse
from checkpoints.record import Token
from parity.diff.compare import comparison
from reports.report import Report

EVIL = "<script>window.stolen = 1</script>"


def passing() -> Report:
    """Two right sides."""
    return _compared(0)


def diverging() -> Report:
    """blk.5.l_out is wrong from position 3 on, and a generated token differs."""
    return _compared(0.03)


def recorded_otherwise(status: str = OTHERWISE) -> Report:
    """`passing`, but that the record of blk.0.l_out is not what it says, or has another status that leaves it unjudged."""
    report = passing()
    points = tuple(
        replace(point, status=status) if point.checkpoint == "blk.0.l_out" else point for point in report.verdict.points
    )
    return replace(report, verdict=replace(report.verdict, points=points))


def hostile() -> Report:
    """A divergence of dumps in which every string is a script: names, texts, versions."""
    header = replace(
        HEADER,
        source=EVIL,
        model=replace(HEADER.model, name=EVIL, architecture=EVIL, file_type=EVIL),
        prompt=EVIL,
        pieces=(EVIL,) * 12,
        build={EVIL: EVIL},
        created=EVIL,
    )
    names = ("embd", "blk.0.l_out", f"blk.1.{EVIL}", "output_norm", "logits")
    right = random(names)
    wrong = spoiled(noisy(right), names[2:], slice(3, None))
    tokens = [(Token(12, number, EVIL, ((number, 2.0), (0, 1.0))),) for number in (7, 8)]
    return _report(
        *(dump(x, header=header, tokens=message, path=EVIL) for x, message in zip((wrong, right), tokens, strict=True))
    )


def huge(layers: int = 24, positions: int = 512) -> Report:
    """Every point of 24 layers at 512 positions, wrong from the middle on: a report's figures without the dumps."""
    names = tuple(all_points(layers))
    half, start = len(names) // 2, 3
    rng = np.random.default_rng(0)
    nmse = 10 ** rng.normal(-13, 0.3, (len(names), positions))
    nmse[half:, start:] = 10 ** rng.normal(-3, 0.3, nmse[half:, start:].shape)
    limit = np.full(nmse.shape, 1e-10)
    grid = Grid(names, tuple((0, t) for t in range(positions)), ("tok",) * positions, nmse, np.sqrt(nmse), nmse / limit, limit)

    def record(p: int, t: int) -> Difference:
        return Difference(
            names[p], parse(names[p]).layer, t, float(nmse[p, t]), 0.1, 1e-10, (1.0, 2.0), (1.0, 2.5),
            fresh=p == half, token="tok", of_limit=float(nmse[p, t] / 1e-10), index=1,
        )  # fmt: skip

    points = tuple(
        PointSummary(
            name, parse(name).layer, positions, (positions - start) * (p >= half), status, record(p, int(nmse[p].argmax()))
        )
        for p, name in enumerate(names)
        for status in [AGREES if p < half else FRESH if p == half else INHERITED]
    )
    first = record(half, start)
    verdict = Verdict(
        DIVERGENCE, nmse.size, "exact", Limits(1e-10, 1e-9, "measured"), points, first, first, (Origin(first, (start,)),)
    )
    side = dump(random(("embd",), positions=1))
    return Report(
        verdict, side, side, Picture(grid, Spread((1.0, 2.0), 2, 1, 2, 1.5, 0.5), Spread((1.0, 2.5), 2, 1, 2.5, 1.75, 0.7))
    )


def _compared(size: float) -> Report:
    right = random()
    wrong = noisy(right)
    if size:
        wrong = spoiled(wrong, ("blk.5.l_out", "blk.10.l_out", "blk.23.l_out", "output_norm", "logits"), slice(3, None), size)
    chosen = 8 if size else 7
    mine = (Token(12, 7, " a", ((chosen, 2.0), (0, 1.0))),)
    theirs = (Token(12, 7, " a", ((7, 2.0), (0, 1.5))),)
    return _report(dump(wrong, tokens=mine), dump(right, tokens=theirs))


def _report(ours, ref) -> Report:  # type: ignore[no-untyped-def]
    compared = comparison(ours, ref)
    return Report(compared.verdict, ours, ref, compared.picture)
