"""`parity diff`: compare two dumps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoints.errors import InputError

from . import options as o

if TYPE_CHECKING:
    from checkpoints.record import Dump

    from ..diff.compare import Options


_TWO = "Leave the third dump out."


@o.fills("tolerance", "compute", "arbiter", "strict", "mapping", "despite_lint")
def diff(
    given: o.Given,
    context: typer.Context,
    ours: Annotated[Path, typer.Argument(help="Your engine's dump.", show_default=False)],
    ref: Annotated[Path, typer.Argument(help="llama.cpp's dump.", show_default=False)],
    third: Annotated[
        Path | None,
        typer.Argument(
            help="A third dump: the answer then says at each point which side disagrees with the other two.", show_default=False
        ),
    ] = None,
    output_format: o.AnswerOption = o.AnswerFormat.TEXT,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="GGUF file of the dumps: measures the error of lower precisions, and finds the one that "
            "OURS uses if its header does not name it; "
            "--arbiter needs it.",
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="If a record occurs twice, use the one of this forward pass.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="Write every record's figures: FILE.csv or FILE.parquet.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report: one HTML file that opens offline.")] = None,
    include: Annotated[
        list[Path] | None,
        typer.Option("--include", help="Add a JSON answer of lint, isolate or explain to the report; can be repeated."),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML: one case for each point.")] = None,
) -> None:
    """Compare two dumps, or three, and name the first divergence.

    Exits 0 for parity, 1 for a divergence, 2 if there is nothing to compare or lint finds a dump unusable.
    """
    from checkpoints.formats import load

    from ..diff.compare import Options, comparison
    from ..lint.lint import refuse_unusable
    from .comparison_output import findings, report, show_report
    from .output import waiting

    if model is None:
        o.refuse_unused(context, "arbiter", "needs the model", "Give its GGUF file with --model.")
    shown = {o.AnswerFormat.TEXT, o.AnswerFormat.MARKDOWN}
    if html is None and output_format not in shown:
        o.refuse_unused(context, "include", f"is not part of --format {output_format.value}", "Add --html FILE.")
    mapping, despite_lint, arbiter = (given.pop(name) for name in ("mapping", "despite_lint", "arbiter"))
    options = Options(**given, step=step, placed=mapping.position_offset is not None)
    if third is not None:
        o.refuse_unused(context, "table html include junit step compute strict", "needs exactly two dumps", _TWO)
        if output_format.value not in set(o.Format):
            raise InputError("the CI formats need exactly two dumps.", _TWO, code="three")
        dumps = load(ours, mapping), load(ref), load(third)
        if not despite_lint:
            for dump, side in zip(dumps, ("the first dump", "the second", "the third"), strict=True):
                refuse_unusable(dump, side)
        raise typer.Exit(_three(dumps, options, model, arbiter, o.Format(output_format.value)))
    if table is not None:
        from ..diff.verdict.table import check_ending

        check_ending(table)
    with waiting("comparing", o.Format.TEXT if output_format is o.AnswerFormat.TEXT else o.Format.JSON):
        left, right = load(ours, mapping), load(ref)
        if not despite_lint:
            refuse_unusable(left, "ours")
            refuse_unusable(right, "the reference")
        if model is None:
            compared = comparison(left, right, options)
        else:
            from msgspec.structs import replace

            from ..diff.measured.tokens import other_settings, same_model
            from ..explain.on_model import compared_on

            same_model(right, model)
            compared = compared_on(left, right, options, model, arbiter)
            notes = (*other_settings(right, model), *compared.verdict.notes)
            compared = replace(compared, verdict=replace(compared.verdict, notes=notes))
    if table is not None:
        from ..diff.verdict.table import write_table

        write_table(compared.records, table)
    whole = report(compared.verdict, left, right, compared.picture, findings(include or ()))
    raise typer.Exit(show_report(whole, output_format, html=html, junit=junit))


def _three(
    dumps: tuple["Dump", "Dump", "Dump"], options: "Options", model: Path | None, arbiter: str, output_format: o.Format
) -> int:
    from .three_way_output import show_three

    if model is None:
        from ..diff.three_way import compare_three

        return show_three(compare_three(dumps, options), dumps, output_format)
    from ..diff.measured.tokens import same_model
    from ..explain.on_model import three_on

    same_model(dumps[1], model)
    return show_three(three_on(dumps, options, model, arbiter), dumps, output_format)
