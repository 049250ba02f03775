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
from .empty_options import Commands

app = typer.Typer(
    cls=Commands,
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


app.command("run", short_help="Run both sides, compare them, name the first divergence.")(run.run)
app.command("diff", short_help="Compare two dumps.")(diff.diff)
app.command("lint", short_help="Check whether a dump can be trusted.")(lint.lint)
app.add_typer(dump.app, name="dump", short_help="Run one side only: our engine, llama.cpp or Hugging Face.")
app.command("isolate", short_help="Judge every operation by its own inputs: name all wrong ones.")(isolate.isolate)
app.command("explain", short_help="Find the known fault that reproduces your engine's numbers.")(explain.explain)
app.add_typer(drift.app, name="drift", short_help="Record golden dumps and check against them in CI.")
app.command("weights", short_help="Dequantise every tensor three ways, or check your weights.")(weights.weights)
app.command("consistency", short_help="Compare an engine with itself: prefill, decode, chunks.")(consistency.consistency)
app.command("conform", short_help="Test an engine on tiny models of every architecture and type.")(conform.conform)
app.command("score", short_help="Measure perplexity and KL divergence over a text.")(score.score)
app.command("convert", short_help="Convert any dump to format 1.")(convert.convert)
app.command("emit", short_help="Print the file that your engine needs to write dumps.")(emit.emit)
app.command("model", short_help="Show what an engine must know about a model.")(model.model)
app.command("tokens", short_help="Show the token ids and pieces of a prompt.")(model.tokens)
app.command("twin", short_help="Write an F32 copy of a model.")(twin.twin)
app.command("synth", short_help="Make a model with random weights.")(synth.synth)
app.command("doctor", short_help="Show what is installed and what is missing.")(doctor.doctor)
