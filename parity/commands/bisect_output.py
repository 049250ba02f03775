"""What `parity run --bisect` prints."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .options import Format
from .output import answer, progress_bar

if TYPE_CHECKING:
    from reference.client import Reference

    from ..run.request import Request


def bisected(request: "Request", started: "Reference", output_format: Format) -> int:
    """Judge the layers, print the answer, write it as diff.json, and return the exit code."""
    from checkpoints.whole_file import put
    from reports import bisect as room

    from ..hunt.bisect import bisect

    with progress_bar(output_format) as progress:
        bisected = bisect(request, progress, started)
    put(Path(bisected.folder) / "diff.json", (json.dumps(room.as_json(bisected), indent=1) + "\n").encode())
    return answer(bisected, room, output_format)
