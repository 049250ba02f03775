"""Options that several commands share, and how their texts become values."""

import inspect
import json
from collections.abc import Callable
from collections.abc import Mapping as Named
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from checkpoints.errors import InputError

from ..run.prompt import given_prompt, numbers

if TYPE_CHECKING:
    from checkpoints.mapping import Mapping
    from checkpoints.record import Dump


class Format(StrEnum):
    """How an answer is printed."""

    TEXT = "text"
    JSON = "json"


class AnswerFormat(StrEnum):
    """How a comparison's answer is printed, CI's formats included."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    JUNIT = "junit"
    GITHUB = "github"


class Mode(StrEnum):
    """What is compared: F32 copies on both sides, or the file's own types."""

    EXACT = "exact"
    NATIVE = "native"


class Side(StrEnum):
    """Who computes."""

    OURS = "ours"
    REF = "ref"


class BackendName(StrEnum):
    """Where our engine computes."""

    AUTO = "auto"
    CUPY = "cupy"
    NUMPY = "numpy"


class Compute(StrEnum):
    """The arithmetic of a foreign engine."""

    F32 = "f32"
    TF32 = "tf32"
    F16 = "f16"
    BF16 = "bf16"
    Q8 = "q8"


class Arbiter(StrEnum):
    """Whether the same steps in float64 say which side is right."""

    OFF = "off"
    AUTO = "auto"
    ALL = "all"


class ServerApi(StrEnum):
    """How a server is asked."""

    AUTO = "auto"
    OPENAI = "openai"
    LLAMA_CPP = "llama.cpp"


_LONGEST_ROW = 1 << 31  # values: more than any row of an activation has
_MOST_THREADS = 512  # GGML_MAX_N_THREADS in ggml.h: beyond it llama.cpp crashes

ModelOption = Annotated[Path | None, typer.Option("--model", "-m", help="GGUF file; default: the embedded stories model.")]
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")]
PromptFileOption = Annotated[Path | None, typer.Option("--prompt-file", help="File with the prompt, UTF-8.")]
TokensOption = Annotated[str | None, typer.Option("--tokens", help="Token ids instead of a prompt: 1,2,3.")]
ModeOption = Annotated[
    Mode, typer.Option("--mode", help="exact: F32 on both sides, a right engine agrees to 1e-12; native: the file's own types.")
]
PointsOption = Annotated[
    str, typer.Option("--points", help="What to record: default, all, or names and globs such as 'blk.{1..5}.{q,k}'.")
]
LayersOption = Annotated[str | None, typer.Option("--layers", help="Layers whose output is recorded: 0,5,10,23.")]
PositionsOption = Annotated[str, typer.Option("--positions", help="all, last, or a list: 0,3,7.")]
SliceOption = Annotated[int, typer.Option("--slice", min=1, max=_LONGEST_ROW, help="Number of leading values in each record.")]
FullOption = Annotated[bool, typer.Option("--full", help="Also write whole tensors, as safetensors.")]
BinaryOption = Annotated[
    bool,
    typer.Option(
        "--binary", help="Write records as arrays in a safetensors file beside the dump: large dumps are read ten times faster."
    ),
]
ArbiterOption = Annotated[
    Arbiter,
    typer.Option(
        "--arbiter",
        help="Let the same steps in float64 say which side is right: where they can decide (auto), everywhere (all), or never (off).",
    ),
]
BackendOption = Annotated[BackendName, typer.Option("--backend", help="Where our engine computes.")]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices", help="CUDA devices, for instance 0,1: consecutive layers go to consecutive devices.", show_default=False
    ),
]
WindowOption = Annotated[
    str,
    typer.Option(
        "--window",
        help="Run llama.cpp in windows of layers: auto, off, or layers per window (exact mode, for models larger than memory).",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=_MOST_THREADS, help="Threads of llama.cpp; default: all cores.")
]
FirstOption = Annotated[int, typer.Option("--first-position", min=0, help="Position of the first token (long-context RoPE).")]
ToleranceOption = Annotated[
    float | None,
    typer.Option("--tolerance", min=0.0, help="NMSE above which a record differs; default: looked up by types and mode."),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Count records that only one side has as a divergence.")]
AnswerOption = Annotated[
    AnswerFormat,
    typer.Option("--format", help="text for people; json; for CI: markdown (job summary), junit, github (annotations)."),
]
ComputeOption = Annotated[
    Compute | None, typer.Option("--compute", help="The arithmetic of your engine, if its dump does not name it.")
]
DespiteLintOption = Annotated[bool, typer.Option("--despite-lint", help="Compare even if lint finds a dump unusable.")]
MapOption = Annotated[
    Path | None, typer.Option("--map", help="TOML file that says what your names mean: their name = our point.")
]
OffsetOption = Annotated[
    int | None,
    typer.Option(
        "--offset", help="Number added to every position of your dump; 0: positions count from the prompt's first token."
    ),
]
ExecOption = Annotated[
    str | None,
    typer.Option(
        "--exec",
        help="Your engine as our side: '[NAME=value …] CMD {model} {tokens} {out} {points}'; {model} is the F32 twin in exact mode.",
    ),
]
ShellOption = Annotated[
    str | None, typer.Option("--exec-shell", help="Your engine as a line for /bin/sh, with the same placeholders.")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--exec-timeout", min=0.001, help="Seconds after which your engine is stopped; default: 3600."),
]
PythonOption = Annotated[
    str,
    typer.Option("--python", envvar="PARITY_HF_PYTHON", help="Interpreter that has torch and transformers, for Hugging Face."),
]
HfDeviceOption = Annotated[str, typer.Option("--hf-device", help="Where Hugging Face computes: cpu, cuda, cuda:1, mps.")]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        help="A running server as our side: its log-probabilities over the prompt, and with --generate its choices.",
        show_default=False,
    ),
]
ServerApiOption = Annotated[
    ServerApi,
    typer.Option("--server-api", help="openai: /v1/completions; llama.cpp: /completion; auto: by the URL, else by trying."),
]
ServerTopOption = Annotated[
    int, typer.Option("--server-top", min=1, max=100, help="Candidates to ask for at each position (OpenAI's limit is 5).")
]
ServerModelOption = Annotated[
    str, typer.Option("--server-model", help="The model's name in requests, for a server that has several.")
]
ServerJsonOption = Annotated[
    str, typer.Option("--server-json", help="JSON object whose members go into every request: '{\"repeat_penalty\": 1}'.")
]
ServerRateOption = Annotated[
    float | None, typer.Option("--server-rate", help="Largest number of requests a second.", show_default=False)
]
ServerTimeoutOption = Annotated[
    float, typer.Option("--server-timeout", help="Seconds a request may take, its retries included.")
]
DumpPrefixOption = Annotated[
    bool,
    typer.Option(
        "--dump-prefix", help="With --server: then dump llama.cpp on the tokens up to the first wrong prediction (ref.jsonl)."
    ),
]
GenerateOption = Annotated[
    int, typer.Option("--generate", min=0, help="Tokens to generate: llama.cpp chooses them, the other side follows.")
]
FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for machines.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's own log.")]


def no_input(out: Path | None, *inputs: Path | None) -> None:
    """Refuse to write over what is read.

    Raises:
        InputError: `out` is one of `inputs`.
    """
    for source in inputs:
        if out is not None and source is not None and out.exists() and source.exists() and out.samefile(source):
            raise InputError(
                f"{out} is an input of this command and must not be overwritten.", "Write to another file.", code="output"
            )


def mapping(names: Path | None, offset: int | None) -> "Mapping":
    """--map and --offset as one mapping: what names mean and where positions count from; --offset replaces the file's own offset.

    Raises:
        InputError: the mapping cannot be read.
    """
    from dataclasses import replace

    from checkpoints.mapping import Mapping, read_mapping

    read = read_mapping(names) if names is not None else Mapping()
    return read if offset is None else replace(read, position_offset=(read.position_offset or 0) + offset)


def dump(path: Path, names: Path | None = None, offset: int | None = None) -> "Dump":
    """Any dump that a user names, whatever its format, with --map and --offset applied.

    Raises:
        DumpError: it cannot be read, or holds nothing. InputError: the mapping cannot be read, or does not fit.
    """
    from checkpoints.formats import load

    return load(path, mapping(names, offset))


def devices(text: str | None) -> tuple[int, ...]:
    """`--devices` as numbers; none for the backend's own choice.

    Raises:
        InputError: they are not numbers, or one occurs twice.
    """
    listed = numbers(text, "--devices") if text is not None else ()
    if len(set(listed)) < len(listed):
        raise InputError(f"--devices {text} names a device more than once.", "Name each device once.", code="devices")
    return listed


def positions(text: str) -> Literal["all", "last"] | tuple[int, ...]:
    """`--positions` as the engine and the reference take it."""
    if text == "all":
        return "all"
    if text == "last":
        return "last"
    listed = numbers(text, "--positions")
    if not listed or min(listed) < 0:
        raise InputError(f"--positions {text!r} is not valid.", "Write all, last, or a list such as 0,3,7.")
    return listed


def window(text: str) -> int | Literal["auto", "off"]:
    """`--window` as the reference takes it."""
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--window must be auto, off or a number of layers, not {text!r}.", "Write e.g. --window 4.")
    return int(text)


def layers(text: str | None) -> tuple[int, ...] | None:
    """`--layers` as the request takes it."""
    return numbers(text, "--layers") if text is not None else None


Given = dict[str, Any]  # fields of a request by name: `Request(**given)`


@dataclass(frozen=True)
class Group:
    """Options that give one or more fields of a request together: `fields` makes those of their texts."""

    options: Named[str, tuple[Any, Any]]  # parameter: (annotation, default)
    fields: Callable[..., Given]


def _one(name: str, annotation: Any, default: Any = None, convert: Callable[[Any], Any] = lambda value: value) -> Group:
    """The option that gives the field of its name."""
    return Group({name: (annotation, default)}, lambda **texts: {name: convert(texts[name])})


def _model(path: Path | None) -> Path:
    from ..models.embedded import path as embedded

    return path or embedded()


def _prompt(prompt: str | None, prompt_file: Path | None, tokens: str | None) -> Given:
    text, ids = given_prompt(prompt, prompt_file, tokens)
    return {"prompt": text, "tokens": ids}


def _server(
    server: str | None,
    server_api: str,
    server_top: int,
    server_model: str,
    server_json: str,
    server_rate: float | None,
    server_timeout: float,
    dump_prefix: bool,
) -> Given:
    if server is None:
        if dump_prefix or server_json or server_model or server_rate is not None:
            raise InputError("--server-… and --dump-prefix need a server.", "Give its URL with --server.", code="server")
        return {"server": None}
    from ..server.http import Connection, key_from_environment
    from ..server.session import ServerRequest

    try:
        extra = json.loads(server_json) if server_json else {}
    except ValueError as error:
        raise InputError(
            f"--server-json is not JSON: {error}.", "Write e.g. '{\"repeat_penalty\": 1}'.", code="server"
        ) from None
    if not isinstance(extra, dict):
        raise InputError("--server-json must be a JSON object.", "Write e.g. '{\"repeat_penalty\": 1}'.", code="server")
    connection = Connection(server, key_from_environment(), server_timeout, server_rate)
    return {"server": ServerRequest(connection, server_api, server_top, server_model, extra, dump_prefix)}


def _optional_prompt(prompt: str | None, prompt_file: Path | None, tokens: str | None) -> Given:
    if all(text is None for text in (prompt, prompt_file, tokens)):
        return {"prompt": None, "tokens": None}
    return _prompt(prompt, prompt_file, tokens)


def _command(command: str | None, shell: str | None, timeout: float | None) -> Given:
    from ..run.command import DEFAULT_TIMEOUT, Command

    if command is not None and shell is not None:
        raise InputError("--exec and --exec-shell were given.", "Take one of them.", code="exec")
    line = command if command is not None else shell
    if line is None:
        if timeout is not None:
            raise InputError("--exec-timeout needs an engine of yours.", "Give its command with --exec.", code="exec")
        return {"command": None}
    return {"command": Command(line, shell=shell is not None, timeout=timeout or DEFAULT_TIMEOUT)}


_PROMPT_OPTIONS = {"prompt": (PromptOption, None), "prompt_file": (PromptFileOption, None), "tokens": (TokensOption, None)}
GROUPS = {
    "model": _one("model", ModelOption, None, _model),
    "prompt": Group(_PROMPT_OPTIONS, _prompt),
    "optional_prompt": Group(_PROMPT_OPTIONS, _optional_prompt),
    "mode": _one("mode", ModeOption, Mode.EXACT),
    "backend": _one("backend", BackendOption, BackendName.AUTO),
    "devices": _one("devices", DevicesOption, None, devices),
    "command": Group({"command": (ExecOption, None), "shell": (ShellOption, None), "timeout": (TimeoutOption, None)}, _command),
    "points": _one("points", PointsOption, "default"),
    "all_points": _one("points", PointsOption, "all"),
    "layers": _one("layers", LayersOption, None, layers),
    "positions": _one("positions", PositionsOption, "all", positions),
    "slice": _one("slice_size", SliceOption, 16),
    "full": _one("full", FullOption, False),
    "binary": _one("binary", BinaryOption, False),
    "generate": _one("generate", GenerateOption, 0),
    "window": _one("window", WindowOption, "auto", window),
    "threads": _one("threads", ThreadsOption),
    "first_position": _one("first_position", FirstOption, 0),
    "tolerance": _one("tolerance", ToleranceOption),
    "strict": _one("strict", StrictOption, False),
    "compute": _one("compute", ComputeOption),
    "mapping": Group(
        {"names": (MapOption, None), "offset": (OffsetOption, None)}, lambda names, offset: {"mapping": mapping(names, offset)}
    ),
    "hugging_face": Group(
        {"python": (PythonOption, "python3"), "hf_device": (HfDeviceOption, "cpu")},
        lambda python, hf_device: {"python": python, "device": hf_device},
    ),
    "server": Group(
        {
            "server": (ServerOption, None),
            "server_api": (ServerApiOption, ServerApi.AUTO),
            "server_top": (ServerTopOption, 5),
            "server_model": (ServerModelOption, ""),
            "server_json": (ServerJsonOption, ""),
            "server_rate": (ServerRateOption, None),
            "server_timeout": (ServerTimeoutOption, 120.0),
            "dump_prefix": (DumpPrefixOption, False),
        },
        _server,
    ),
    "despite_lint": _one("despite_lint", DespiteLintOption, False),
    "verbose": _one("verbose", VerboseOption, False),
}


def fills(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameter, `given`, holds the fields that these groups of options give, each declared once, above.

    The command's other parameters stand behind them; where it has `out`, none of the files that it reads may be that one.
    """
    groups = [GROUPS[name] for name in names]

    def made(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        options = {name: option for group in groups for name, option in group.options.items()}
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in options.items()
        ]

        @wraps(command)
        def called(**texts: Any) -> None:
            given: Given = {}
            no_input(texts.get("out"), *(text for name, text in texts.items() if name != "out" and isinstance(text, Path)))
            for group in groups:
                given |= group.fields(**{name: _plain(texts.pop(name)) for name in group.options})
            command(given, **texts)

        required = [p.replace(kind=keyword) for p in own if p.default is p.empty]
        others = [p.replace(kind=keyword) for p in own if p.default is not p.empty]
        called.__signature__ = inspect.Signature([*required, *added, *others])  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*required, *added, *others)}
        return called

    return made


def _plain(value: Any) -> Any:
    """An enumeration's text: requests travel to other processes, which know nothing of commands."""
    return value.value if isinstance(value, Enum) else value
