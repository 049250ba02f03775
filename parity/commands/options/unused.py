"""Options that nothing would read in the way a command is used: they are refused, not ignored."""

import typer

from checkpoints.errors import InputError


def refuse_unused(context: typer.Context, names: str, reason: str, advice: str = "Leave it out.") -> None:
    """Refuse options that were written on the command line although nothing would read them. What a variable sets may stay set.

    Args:
        names: the parameters of these options, separated by spaces.
        reason: the end of a sentence that begins with the option: "has no effect without --model".

    Raises:
        InputError: one of them was given.
    """
    wanted = names.split()
    for parameter in context.command.params:
        if parameter.name in wanted and _written(context, str(parameter.name)):
            raise InputError(f"{parameter.opts[0]} {reason}.", advice, code="unused-option")


def _written(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
