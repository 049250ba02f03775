"""The commands' names and their help; each command lives in a file of its own in `parity.commands`."""

from typing import Annotated

import typer

from .. import version as parity_version
from . import (
    conform,
    consistency,
    convert,
    diff,
    doctor,
    drift,
    dump,
    emit,
    explain,
    isolate,
    lint,
    model,
    run,
    score,
    synth,
    twin,
    weights,
)

app = typer.Typer(
    name="parity",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # importing what renders it costs as much as all the rest of --help
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Finds the first place where a transformer engine stops agreeing with llama.cpp, and says why.",
    epilog="Exit codes: 0 parity · 1 divergence · 2 wrong input or request · 3 internal error · 130 interrupted · 141 output not read",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"parity {parity_version()}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


app.command("run", short_help="Both sides, the comparison, the first divergence.")(run.run)
app.command("diff", short_help="Compare two dumps.")(diff.diff)
app.command("lint", short_help="Is this dump itself to be believed?")(lint.lint)
app.add_typer(dump.app, name="dump", short_help="One side only: our engine, or llama.cpp.")
app.command("isolate", short_help="Every operation by its own inputs: which are wrong, all of them.")(isolate.isolate)
app.command("explain", short_help="Which known fault reproduces your engine's numbers.")(explain.explain)
app.add_typer(drift.app, name="drift", short_help="Golden dumps that keep numbers from moving unseen.")
app.command("weights", short_help="Every weight dequantised three times; or yours against the file.")(weights.weights)
app.command("consistency", short_help="An engine against itself: prefill, decode, chunks.")(consistency.consistency)
app.command("conform", short_help="Tiny models of every architecture and type through an engine.")(conform.conform)
app.command("score", short_help="Perplexity and KL divergence of two sides over a text.")(score.score)
app.command("convert", short_help="Any dump as format 1.")(convert.convert)
app.command("emit", short_help="The file that your own engine needs to write dumps.")(emit.emit)
app.command("model", short_help="What an engine must know of a model.")(model.model)
app.command("tokens", short_help="Ids and pieces of a prompt.")(model.tokens)
app.command("twin", short_help="An F32 copy of a model.")(twin.twin)
app.command("synth", short_help="A model of any shape, random weights.")(synth.synth)
app.command("doctor", short_help="What is installed, what is missing.")(doctor.doctor)
