"""The table of options: which option sets which fields of a request, and the decorator that adds them to a command."""

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial, wraps
from pathlib import Path
from typing import Any

from msgspec import Struct

from . import declared, references, server, values
from .choices import ArbiterChoice, BackendName, Mode
from .values import Given


class OptionGroup(Struct, frozen=True):
    """Options that set one or more fields of a request together: `fields` computes those from their texts."""

    options: Mapping[str, tuple[Any, Any]]  # parameter: (annotation, default)
    fields: Callable[..., Given]


def _single(
    name: str, annotation: Any, default: Any = None, convert: Callable[[Any], Any] = lambda value: value
) -> OptionGroup:
    """The option that sets the field of its own name."""
    return OptionGroup({name: (annotation, default)}, lambda **texts: {name: convert(texts[name])})


def _command(annotation: Any, timeout: Any = declared.TimeoutOption, seconds: float | None = None) -> OptionGroup:
    """The options of an engine that a command line starts, with this --exec; it is stopped after `seconds`, by default."""
    options = {"command": annotation, "shell": declared.ShellOption, "timeout": timeout}
    return OptionGroup(
        {name: (option, None) for name, option in options.items()}, partial(values.command_fields, default=seconds)
    )


_PROMPT_OPTIONS = {
    "prompt": (declared.PromptOption, None),
    "prompt_file": (declared.PromptFileOption, None),
    "tokens": (declared.TokensOption, None),
}
GROUPS = {
    "model": _single("model", declared.ModelOption, None, values.model_path),
    "prompt": OptionGroup(_PROMPT_OPTIONS, values.prompt_fields),
    "optional_prompt": OptionGroup(_PROMPT_OPTIONS, values.optional_prompt_fields),
    "text": OptionGroup(
        {"prompt": (declared.PromptOption, None), "prompt_file": (declared.PromptFileOption, None)}, values.text_field
    ),
    "mode": _single("mode", declared.ModeOption, Mode.EXACT),
    "backend": _single("backend", declared.BackendOption, BackendName.AUTO),
    "devices": _single("devices", declared.DevicesOption, None, values.devices),
    "command": _command(declared.ExecOption),
    "tested_command": _command(declared.TestedExecOption, declared.TinyTimeoutOption, declared.TINY_TIMEOUT),
    "points": _single("points", declared.PointsOption, "default"),
    "all_points": _single("points", declared.PointsOption, "all"),
    "layers": _single("layers", declared.LayersOption, None, values.layers),
    "positions": _single("positions", declared.PositionsOption, "all", values.positions),
    "slice": _single("slice_size", declared.SliceOption, 16),
    "full": _single("full", declared.FullOption, False),
    "binary": _single("binary", declared.BinaryOption, False),
    "generate": _single("generate", declared.GenerateOption, 0),
    "window": _single("window", declared.WindowOption, "auto", values.window),
    "threads": _single("threads", declared.ThreadsOption),
    "first_position": _single("first_position", declared.FirstOption, 0),
    "tolerance": _single("tolerance", declared.ToleranceOption, None, values.tolerance),
    "strict": _single("strict", declared.StrictOption, False),
    "compute": _single("compute", declared.ComputeOption),
    "arbiter": _single("arbiter", declared.ArbiterOption, ArbiterChoice.AUTO),
    "mapping": OptionGroup(
        {"names": (declared.MapOption, None), "offset": (declared.OffsetOption, None)},
        lambda names, offset: {"mapping": values.mapping(names, offset)},
    ),
    "hugging_face": OptionGroup(
        {"python": (declared.PythonOption, "python3"), "hf_device": (declared.HfDeviceOption, "cpu")},
        lambda python, hf_device: {"python": python, "device": hf_device},
    ),
    "others": OptionGroup(references.OPTIONS, references.others_field),
    "server": OptionGroup(server.OPTIONS, server.server_field),
    "scored_server": OptionGroup(server.SCORED_OPTIONS, server.server_field),
    "asking": OptionGroup({name: server.OPTIONS[name] for name in ("server_api", "server_json")}, server.asking_fields),
    "despite_lint": _single("despite_lint", declared.DespiteLintOption, False),
    "verbose": _single("verbose", declared.VerboseOption, False),
}


# The outputs of a command; every other path that it is given is read.
_OUTPUTS = frozenset({"out", "table", "html", "junit", "save_base", "summary", "ledger"})


def fills(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameter, `given`, holds the fields that these groups of options set.

    The command's other parameters follow the options. None of the files that it reads may be one that it writes.
    """
    groups = [GROUPS[name] for name in names]

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        options = {name: option for group in groups for name, option in group.options.items()}
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in options.items()
        ]

        @wraps(command)
        def called(**texts: Any) -> None:
            given: Given = {}
            values.keep_inputs(_paths(texts, written=True), _paths(texts, written=False))
            for group in groups:
                given |= group.fields(**{name: _plain(texts.pop(name)) for name in group.options})
            values.keep_inputs(_paths(texts, written=True), _paths(given, written=False))  # the embedded model, too
            command(given, **texts)

        required = [p.replace(kind=keyword) for p in own if p.default is p.empty]
        others = [p.replace(kind=keyword) for p in own if p.default is not p.empty]
        called.__signature__ = inspect.Signature([*required, *added, *others])  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*required, *added, *others)}
        return called

    return with_options


def _paths(texts: Mapping[str, Any], *, written: bool) -> list[Path]:
    """The paths that a command was given: either its outputs or its inputs."""
    given = [value for name, value in texts.items() if (name in _OUTPUTS) is written]
    return [path for value in given for path in (value if isinstance(value, list) else [value]) if isinstance(path, Path)]


def _plain(value: Any) -> Any:
    """An enumeration's text: requests are sent to other processes, which know nothing of commands."""
    return value.value if isinstance(value, Enum) else value
