"""What a comparison of three sides prints."""

import json
from typing import TYPE_CHECKING

from .options import Format
from .output import DIVERGENCE_CODE, PARITY_CODE

if TYPE_CHECKING:
    from checkpoints.answers.three_way import ThreeWay
    from checkpoints.record import Dump


def show_three(three_way: "ThreeWay", dumps: "tuple[Dump, Dump, Dump]", output_format: Format) -> int:
    """Print the answer and return the exit code."""
    from reports.three_way import as_json, lines

    if output_format is Format.JSON:
        print(json.dumps(as_json(three_way)))
        return PARITY_CODE if three_way else DIVERGENCE_CODE
    from rich.console import Console

    from reports.header import print_header, print_lines

    console = Console()
    print_header(console, dumps[0].header, dumps[1].header, "".join(token.text for token in dumps[1].tokens))
    print_lines(console, lines(three_way, console.width))
    return PARITY_CODE if three_way else DIVERGENCE_CODE
