"""The options of a server as a side, and the request that they form together."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from checkpoints.errors import InputError
from checkpoints.given_json import decoded

from .values import Given


class ServerApi(StrEnum):
    """The API by which a server is asked."""

    AUTO = "auto"
    OPENAI = "openai"
    LLAMA_CPP = "llama.cpp"


_EXAMPLE = "Write e.g. '{\"repeat_penalty\": 1}'."
OPTIONS: dict[str, tuple[Any, Any]] = {
    "server": (
        Annotated[
            str | None,
            typer.Option(
                "--server",
                help="URL of a running server, which is then our side: its log-probabilities are compared, and with --generate "
                "its choices too. --tolerance is then a KL divergence.",
                show_default=False,
            ),
        ],
        None,
    ),
    "server_api": (
        Annotated[
            ServerApi,
            typer.Option(
                "--server-api",
                help="openai: /v1/completions; llama.cpp: /completion; auto: decided by the URL, otherwise by trying.",
            ),
        ],
        ServerApi.AUTO,
    ),
    "server_top": (
        Annotated[
            int,
            typer.Option(
                "--server-top", min=1, max=100, help="Candidates to ask for at each position (OpenAI allows at most 5)."
            ),
        ],
        5,
    ),
    "server_model": (
        Annotated[str, typer.Option("--server-model", help="The model's name in requests, for a server that has several.")],
        "",
    ),
    "server_json": (
        Annotated[
            str,
            typer.Option(
                "--server-json", help="JSON object whose members are added to every request: '{\"repeat_penalty\": 1}'."
            ),
        ],
        "",
    ),
    "server_rate": (
        Annotated[
            float | None, typer.Option("--server-rate", help="Largest number of requests per second.", show_default=False)
        ],
        None,
    ),
    "server_timeout": (
        Annotated[float, typer.Option("--server-timeout", help="Seconds that a request may take, its retries included.")],
        120.0,
    ),
    "dump_prefix": (
        Annotated[
            bool,
            typer.Option(
                "--dump-prefix",
                help="With --server: also dump llama.cpp on the tokens up to the first wrong prediction (ref.jsonl).",
            ),
        ],
        False,
    ),
}
# The same without what records a prompt: a text is only scored.
SCORED_OPTIONS = {
    **{name: option for name, option in OPTIONS.items() if name != "dump_prefix"},
    "server": (
        Annotated[
            str | None,
            typer.Option(
                "--server",
                help="URL of a running server, which is then our side: its log-probabilities are compared.",
                show_default=False,
            ),
        ],
        None,
    ),
}


def server_field(
    server: str | None,
    server_api: str,
    server_top: int,
    server_model: str,
    server_json: str,
    server_rate: float | None,
    server_timeout: float,
    dump_prefix: bool | None = None,
) -> Given:
    """The server and how to ask it; None without --server. `dump_prefix` is None for a command without that option.

    Raises:
        InputError: the URL, the JSON or a number is wrong, or one of these options is given without --server.
    """
    if server is None:
        others = (server_api, server_top, server_model, server_json, server_rate, server_timeout, bool(dump_prefix))
        if others != tuple(default for name, (_, default) in OPTIONS.items() if name != "server"):
            options = "--server-…" if dump_prefix is None else "--server-… and --dump-prefix"
            raise InputError(f"The options {options} need a server.", "Give its URL with --server.", code="server")
        return {"server": None}
    from ...server.http import Connection, key_from_environment
    from ...server.session import ServerRequest

    extra = members(server_json)
    connection = Connection(server, key_from_environment(), server_timeout, server_rate)
    return {"server": ServerRequest(connection, server_api, server_top, server_model, extra, bool(dump_prefix))}


def members(server_json: str) -> dict[str, Any]:
    """What --server-json adds to every request.

    Raises:
        InputError: it is not a JSON object.
    """
    try:
        extra = decoded(server_json) if server_json else {}
    except ValueError as error:
        raise InputError(f"--server-json is not JSON: {error}.", _EXAMPLE, code="server") from None
    if not isinstance(extra, dict):
        raise InputError("--server-json must be a JSON object.", _EXAMPLE, code="server")
    return extra


def asking_fields(server_api: str, server_json: str) -> Given:
    """How a server is asked that is started for each model.

    Raises:
        InputError: the JSON is wrong.
    """
    members(server_json)
    return {"server_api": server_api, "server_json": server_json}
