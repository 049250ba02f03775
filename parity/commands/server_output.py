"""What `parity run --server` asks and prints."""

from typing import TYPE_CHECKING, Any

from .options import Format
from .output import answer, progress_bar

if TYPE_CHECKING:
    from ..server.session import ServerRequest


def compared_with_server(given: dict[str, Any], server: "ServerRequest", output_format: Format) -> int:
    """Compare a server with llama.cpp, print the answer, and return the exit code."""
    from reports import server as room

    from ..run.request import Request
    from ..server.session import compare_server

    with progress_bar(output_format) as progress:
        compared = compare_server(Request(**given), server, progress)
    return answer(compared, room, output_format)
