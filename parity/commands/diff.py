"""`parity diff`: compare two dumps."""

from pathlib import Path
from typing import Annotated

import typer

from checkpoints.errors import InputError

from . import options as o


def diff(
    ours: Annotated[Path, typer.Argument(help="Your engine's dump.", show_default=False)],
    ref: Annotated[Path, typer.Argument(help="llama.cpp's dump.", show_default=False)],
    third: Annotated[
        Path | None,
        typer.Argument(
            help="A third dump: the answer then says at each point which side disagrees with the other two.", show_default=False
        ),
    ] = None,
    form: o.AnswerOption = o.AnswerFormat.TEXT,
    tolerance: o.ToleranceOption = None,
    compute: o.ComputeOption = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="GGUF file of the dumps: measures the error of lower precisions on it, and which one OURS uses if it does not say.",
        ),
    ] = None,
    arbiter: o.ArbiterOption = o.Arbiter.AUTO,
    strict: o.StrictOption = False,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="If a record occurs twice, use the one of this forward pass.")
    ] = None,
    names: o.MapOption = None,
    offset: o.OffsetOption = None,
    despite_lint: o.DespiteLintOption = False,
    table: Annotated[
        Path | None, typer.Option("--table", help="Write every record's figures: FILE.csv or FILE.parquet.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report: one HTML file that opens offline.")] = None,
    include: Annotated[
        list[Path] | None,
        typer.Option("--include", help="For the report: a JSON answer of lint, isolate or explain; repeat the option."),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML besides: one case a point.")] = None,
) -> None:
    """Compare two dumps, or three, and name the first divergence.

    Exits 0 for parity, 1 for a divergence, 2 if there is nothing to compare or lint finds a dump unusable.
    """
    if third is not None:
        raise typer.Exit(_three((ours, ref, third), form, (table, html, junit, model, step), names, offset, tolerance))
    from checkpoints.formats import load

    from ..diff.compare import Options, comparison
    from ..lint.lint import refuse_unusable
    from .comparison_output import findings, report, show_report

    for out in (table, html, junit):
        o.no_input(out, ours, ref, model, names, *(include or ()))
    if table is not None:
        from ..diff.table import check_ending

        check_ending(table)
    mapping = o.mapping(names, offset)
    left, right = load(ours, mapping), load(ref)
    if not despite_lint:
        refuse_unusable(left, "ours")
        refuse_unusable(right, "the reference")
    chosen = Options(
        tolerance=tolerance,
        compute=compute.value if compute else None,
        strict=strict,
        step=step,
        placed=mapping.position_offset is not None,
    )
    if model is None:
        found = comparison(left, right, chosen)
    else:
        from ..diff.tokens import same_model
        from ..explain.on_model import compared_on

        same_model(right, model)
        found = compared_on(left, right, chosen, model, arbiter.value)
    if table is not None:
        from ..diff.table import write_table

        write_table(found.records, table)
    whole = report(found.verdict, left, right, found.picture, findings(include or ()))
    raise typer.Exit(show_report(whole, form, html=html, junit=junit))


def _three(
    paths: tuple[Path, Path, Path],
    form: o.AnswerFormat,
    given: tuple[object, ...],
    names: Path | None,
    offset: int | None,
    tolerance: float | None,
) -> int:
    from checkpoints.formats import load

    from ..diff.compare import Options
    from ..diff.three_way import compare_three
    from .three_way_output import show_three

    if any(value is not None for value in given) or form.value not in (o.Format.TEXT, o.Format.JSON):
        raise InputError(
            "--table, --html, --junit, --model, --step and the CI formats need exactly two dumps.",
            "Leave the third dump out.",
            code="three",
        )
    mapping = o.mapping(names, offset)
    dumps = (load(paths[0], mapping), load(paths[1]), load(paths[2]))
    options = Options(tolerance=tolerance, placed=mapping.position_offset is not None)
    return show_three(compare_three(dumps, options), dumps, o.Format(form.value))
