"""Empty texts in place of a path or a word, as unset shell variables leave them: Python takes an empty path for the current folder."""

from contextlib import suppress
from typing import Any

from typer.core import TyperGroup

from checkpoints.errors import InputError

_SAID_BY_THE_COMMAND = {"--exec", "--exec-shell", "--prompt", "--tokens", "--points"}  # with an example


class Commands(TyperGroup):
    """Commands of which none takes an empty text for a path or a word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called. Raises InputError where something that it is given is empty."""
        name, command, rest = super().resolve_command(ctx, args)
        if any(not word or word.endswith("=") for word in rest):
            _refuse_empty(command, ctx, rest)
        return name, command, rest


def _refuse_empty(command: Any, ctx: Any, args: list[str]) -> None:
    given: dict[str, Any] = {}
    with suppress(Exception):  # a wrong request is said by the command itself
        parser = command.make_parser(ctx)
        parser.allow_interspersed_args = True  # the context is that of the program, whose words stand before the command
        given = parser.parse_args(args=list(args))[0]
    for parameter in command.params:
        value = given.get(parameter.name)
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name.upper()
        if name not in _SAID_BY_THE_COMMAND and "" in (value if isinstance(value, list | tuple) else [value]):
            alternative = ", or . for this folder" if parameter.type.name == "path" else ", or leave the option out"
            raise InputError(f"{name} is empty.", f"Is a variable unset? Give a value{alternative}.", code="empty-option")
