"""What `parity conform` prints while it runs and afterwards, and the files that it writes."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from checkpoints.errors import InputError

from .options import AnswerFormat
from .output import DIVERGENCE_CODE, PARITY_CODE

if TYPE_CHECKING:
    from checkpoints.answers.conform import CellResult, Conformance

    from ..conform.served import Asking
    from ..run.command import Command

_INTERRUPTED = 130


class Shown:
    """Progress: a bar with an estimate on a terminal's stderr, and the first failure as soon as it is found."""

    def __init__(self, output_format: AnswerFormat) -> None:
        self._text = output_format in (AnswerFormat.TEXT, AnswerFormat.GITHUB)
        self._bar: Any = None
        self._task: Any = None
        self._failed = False

    def __enter__(self) -> Self:
        if self._text and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("cells", total=None)
        return self

    def __call__(self, result: "CellResult", done: int, total: int) -> None:
        """A cell is finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=result.cell.architecture)
        if result.wrong and not self._failed and self._text:
            from reports.conform import first_failure

            self._failed = True
            sentence = f"first failure, cell {done} of {total}: {first_failure(result)}"
            if self._bar is not None:
                self._bar.console.print(sentence, highlight=False, markup=False)
            else:
                print(sentence, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def check_side(command: "Command | None", side: str | None, asking: "Asking") -> None:
    """Refuse a request that does not say who is tested.

    Raises:
        InputError: neither --exec nor --side, both where they do not go together, a server's command without its placeholders, or
            options of a server without one.
    """
    from ..conform import served
    from ..run.command import MODEL, PORT
    from ..server.dialects import AUTO

    if side == "server":
        if command is None or not (command.takes(PORT) and command.takes(MODEL)):
            raise InputError(
                "--side server needs a command that starts a server.",
                "Write --exec 'my-server --model {model} --port {port}'.",
                code="usage",
            )
    elif (command is None) == (side is None):
        raise InputError(
            "no engine to test was given." if command is None else "more than one engine to test was given.",
            "Use one of --exec CMD, --side ours and --side hf.",
            code="usage",
        )
    elif command is not None and command.takes(PORT):
        raise InputError("--exec names {port}, but no server was asked for.", "Add --side server.", code="usage")
    elif asking != served.Asking(AUTO):
        raise InputError("--server-api and --server-json need a server.", "Add --side server.", code="usage")


def check_outputs(junit: Path | None, table: Path | None) -> None:
    """Refuse output files that cannot be written before hours are spent on the run.

    Raises:
        InputError: a table with an unknown file ending, or a folder that does not exist.
    """
    from ..diff.verdict.table import check_ending

    if table is not None:
        check_ending(table)
    for path in (junit, table):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(
                f"cannot write {path}: the folder {path.parent} does not exist.",
                "Create the folder, or choose another one.",
                code="output",
            )


def show(conformance: "Conformance", output_format: AnswerFormat, *, junit: Path | None, table: Path | None) -> int:
    """Print the answer, write index.html and whatever else was asked for, and return the exit code.

    Raises:
        InputError: nothing was compared (every cell was refused), or a file cannot be written.
    """
    from reports import conform as report
    from reports.conform_html import conform_html
    from reports.files import save

    save(conform_html(conformance), Path(conformance.folder) / "index.html")
    save(json.dumps(report.as_json(conformance)) + "\n", Path(conformance.folder) / "conform.json")
    if junit is not None or output_format is AnswerFormat.JUNIT:
        from reports.junit import conform_as_junit

        text = conform_as_junit(conformance)
        if junit is not None:
            save(text, junit)
        if output_format is AnswerFormat.JUNIT:
            print(text, end="")
    if table is not None:
        from ..conform.table import write_table

        write_table(conformance, table)
    if output_format is AnswerFormat.JSON:
        print(json.dumps(report.as_json(conformance)))
    elif output_format is AnswerFormat.MARKDOWN:
        print(report.markdown(conformance), end="")
    elif output_format is not AnswerFormat.JUNIT:
        from rich.console import Console

        from reports.header import print_lines

        console = Console()
        print_lines(console, list(report.lines(conformance, console.width)))
    if conformance.not_run:
        return _INTERRUPTED
    if conformance and not any(result.compared for result in conformance.results):
        raise InputError(report.nothing_compared(conformance), "Widen the matrix, or check the command.", code="nothing")
    return PARITY_CODE if conformance else DIVERGENCE_CODE
