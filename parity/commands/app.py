"""The commands' names and their help; each command lives in a file of its own in `parity.commands`."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer

from .. import version as parity_version
from .empty_options import Commands

_COMMANDS = {  # name: where it is defined, and its line in `parity --help`
    "run": ("run.run", "Run both sides, compare them, name the first divergence."),
    "diff": ("diff.diff", "Compare two dumps."),
    "lint": ("lint.lint", "Check whether a dump can be trusted."),
    "dump": ("dump.app", "Run one side only: our engine, llama.cpp or Hugging Face."),
    "isolate": ("isolate.isolate", "Judge every operation by its own inputs: name all wrong ones."),
    "explain": ("explain.explain", "Find the known fault that reproduces your engine's numbers."),
    "drift": ("drift.app", "Record golden dumps and check against them in CI."),
    "weights": ("weights.weights", "Dequantise every tensor three ways, or check your weights."),
    "consistency": ("consistency.consistency", "Compare an engine with itself: prefill, decode, chunks."),
    "conform": ("conform.conform", "Test an engine on tiny models of every architecture and type."),
    "score": ("score.score", "Measure perplexity and KL divergence over a text."),
    "convert": ("convert.convert", "Convert any dump to format 1."),
    "emit": ("emit.emit", "Print the file that your engine needs to write dumps."),
    "model": ("model.model", "Show what an engine must know about a model."),
    "tokens": ("model.tokens", "Show the token ids and pieces of a prompt."),
    "twin": ("twin.twin", "Write an F32 copy of a model."),
    "synth": ("synth.synth", "Make a model with random weights."),
    "doctor": ("doctor.doctor", "Show what is installed and what is missing."),
}
_SETTINGS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "rich_markup_mode": None,  # importing what renders it costs as much as all the rest of --help
}


class _Built(Mapping[str, Any]):
    """The commands by name, each imported and built when it is looked up: building all of them takes longer than a short command."""

    def __len__(self) -> int:
        return len(_COMMANDS)

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __getitem__(self, name: str) -> Any:
        place, short_help = _COMMANDS[name]
        module, attribute = place.split(".")
        command = getattr(import_module(f".{module}", __package__), attribute)
        parent = typer.Typer(**_SETTINGS)
        if isinstance(command, typer.Typer):
            parent.add_typer(command, name=name, short_help=short_help)
        else:
            parent.command(name, short_help=short_help)(command)
        return typer.main.get_group(parent).commands[name]


class _Commands(Commands):
    """The group of all commands, whose help needs none of them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Built()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the table."""
        return list(_COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in _COMMANDS.items()])


app = typer.Typer(
    name="parity",
    cls=_Commands,
    no_args_is_help=True,
    **_SETTINGS,
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
