"""`parity run`: both sides, the comparison, one screen."""

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoints.errors import InputError

from . import options as o

if TYPE_CHECKING:
    from checkpoints.record import Dump
    from reference.client import Reference

    from ..diff.compare import Comparison, Options
    from ..run.references import Other
    from ..run.request import Request
    from ..server.session import ServerRequest


def _judged(request: "Request", ours: "Dump", ref: "Dump", options: "Options") -> "Comparison":
    """A comparison of two dumps of a model whose file is available."""
    from ..explain.on_model import compared_on

    return compared_on(ours, ref, options, request.model, request.arbiter)


def _prepare(output_format: o.Format) -> None:
    """Import what is needed after both sides have run, to do so while llama.cpp computes."""
    import parity.explain.on_model  # noqa: F401

    from .comparison_output import prepare

    prepare(output_format)


class Third(StrEnum):
    """A third side besides ours and llama.cpp."""

    HUGGING_FACE = "hf"


@o.fills(
    *("model", "prompt", "mode", "backend", "devices", "command", "points", "layers", "positions", "slice", "generate"),
    *(
        "full",
        "binary",
        "window",
        "threads",
        "first_position",
        "tolerance",
        "strict",
        "compute",
        "arbiter",
        "mapping",
        "despite_lint",
        "verbose",
        "hugging_face",
        "others",
        "server",
    ),
)
def run(
    given: o.Given,
    context: typer.Context,
    hunt: Annotated[
        bool,
        typer.Option(
            "--hunt",
            help="Run your engine repeatedly with more points ({points}) until the operation and its cause are found.",
        ),
    ] = False,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect",
            help="Feed each layer of your engine llama.cpp's input and name the wrong ones (two runs; the engine calls parity_inject).",
        ),
    ] = False,
    other: Annotated[
        Third | None,
        typer.Option(
            "--with",
            help="Also run a third side, hf: Hugging Face (--python), and name the side that disagrees.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; default: runs/<time>-<model>.")] = None,
    output_format: o.FormatOption = o.Format.TEXT,
) -> None:
    """Run a prompt through our engine (or yours, --exec) and llama.cpp, and find the first divergence.

    With --exec every point that your engine prints is compared; {points} stands for the names of the wanted points, separated by commas.
    With --hunt the run continues by itself from the first divergence to the operation, and then looks for the cause:

      parity run -p Hi --exec "./engine {model} {tokens} {out} {points}" --hunt

    With --bisect two runs tell which layers are wrong: each gets llama.cpp's own input, so no error is inherited. The engine
    takes that input with parity_inject (in `parity emit c` and `python`), after the checkpoints of embd and of each blk.N.l_out.

    With --server a running server is our side. It has no checkpoints: its log-probabilities and choices are compared, an explanation
    is named (BOS, template, sampler), and the command that continues with checkpoints is printed:

      parity run -p Hi -m M.gguf --server http://127.0.0.1:8080 --generate 32

    With --ref-python or --ref-lib other versions or builds of llama.cpp run beside the installed one: a table shows at which points the
    reference itself moved, and our side may differ as much as references differ from each other by rounding.

    Exits 0 for parity, 1 for a divergence, or if an engine stopped halfway: it was asked for its logits and did not print them, or
    printed nothing at the prompt's last position.
    """
    _refuse_mixtures(given, hunt=hunt, bisect=bisect, third=other is not None)
    _refuse_unused(context, given, hunt=hunt, bisect=bisect, third=other is not None)
    python, device, others = given.pop("python"), given.pop("device"), given.pop("others")
    if (server := given.pop("server")) is not None:
        raise typer.Exit(_with_server({**given, "out": out}, server, output_format))
    from reference.child import Child

    child = Child(given["verbose"])  # it imports llama.cpp while this process imports all the rest
    from reference.client import Reference

    started = Reference(verbose=given["verbose"], threads=given["threads"], child=child)
    from ..run.request import Request

    request = Request(**given, out=out)
    if bisect:
        raise typer.Exit(_bisected(request, started, output_format))
    if hunt:
        from .hunt_output import hunted

        raise typer.Exit(hunted(request, started, output_format))
    if other is not None:
        raise typer.Exit(_with_hugging_face(request, started, python, device, output_format))
    raise typer.Exit(_two_sides(request, started, others, output_format))


def _refuse_mixtures(given: o.Given, *, hunt: bool, bisect: bool, third: bool) -> None:
    """Raises InputError for options that cannot be combined."""
    from checkpoints.mapping import Mapping

    engine, server, others = given["command"] is not None, given["server"] is not None, bool(given["others"])
    late, command, leave = bool(given["first_position"]), "Give its command with --exec.", "Leave them out."
    mixtures = (  # whether it was asked for, what is wrong with it, what to do, the error's code
        (not engine and given["mapping"] != Mapping(), "--map and --offset need an engine of yours.", command, "exec"),
        (hunt and not engine, "--hunt needs an engine of yours.", command, "exec"),
        (
            bisect and (not engine or hunt or third or server or others),
            "--bisect needs an engine of yours (--exec), and cannot be combined with --hunt, another side or another llama.cpp.",
            "Leave the others out.",
            "bisect",
        ),
        (
            others and (hunt or third or server),
            "--ref-python and --ref-lib (or $LLAMA_CPP_LIB) cannot be combined with --hunt, --with or --server.",
            leave,
            "builds",
        ),
        (
            third and (given["mode"] != "exact" or hunt),
            "--with hf works in exact mode only (it computes in float32), and not with --hunt.",
            "",
            "three",
        ),
        (
            server and (engine or third or given["positions"] != "all" or given["full"] or late),
            "--server cannot be combined with --exec, --with, --positions, --first-position or --full.",
            leave,
            "server",
        ),
        (
            bisect and late,
            "--bisect works only for a prompt that starts at position 0.",
            "Leave --first-position out.",
            "bisect",
        ),
    )
    for mixed, message, advice, code in mixtures:
        if mixed:
            raise InputError(message, advice, code=code)


def _refuse_unused(context: typer.Context, given: o.Given, *, hunt: bool, bisect: bool, third: bool) -> None:
    """Raises InputError for options that nothing would read."""
    if not third:
        o.refuse_unused(context, "python hf_device", "is for Hugging Face", "Add --with hf.")
    if given["points"] != "default":
        o.refuse_unused(context, "layers", "chooses among the default points", "Leave --points out, or name layers there.")
    if given["command"] is not None and not hunt:
        o.refuse_unused(context, "backend devices", "is for the engine that comes with parity, which --exec replaces")
    if hunt:
        o.refuse_unused(context, "devices", "is for the engine that comes with parity, which --exec replaces")
    if bisect:
        o.refuse_unused(context, "layers arbiter", "has no effect with --bisect, which judges every layer")
    if given["server"] is not None:
        o.refuse_unused(
            context,
            "layers strict compute arbiter backend devices despite_lint",
            "has no effect with --server: a server has no checkpoints",
        )
        if not given["server"].dump_prefix:
            o.refuse_unused(
                context, "points slice_size binary window", "is for what --dump-prefix records", "Add --dump-prefix."
            )
    if given["mode"] != "exact":
        o.refuse_unused(context, "window", "works in exact mode only")


def _with_server(given: o.Given, server: "ServerRequest", output_format: o.Format) -> int:
    """A server and llama.cpp: print the comparison, and return the exit code."""
    from reports import server as room

    from ..run.request import Request
    from ..server.session import compare_server
    from .output import answer, progress_bar

    with progress_bar(output_format) as progress:
        compared = compare_server(Request(**given), server, progress)
    return answer(compared, room, output_format)


def _bisected(request: "Request", started: "Reference", output_format: o.Format) -> int:
    """The layers of an engine, each on llama.cpp's input: print the answer, write it as diff.json, and return the exit code."""
    import json

    from checkpoints.whole_file import put
    from reports import bisect as room

    from ..hunt.bisect import bisect
    from .output import answer, progress_bar

    with progress_bar(output_format) as progress:
        bisected = bisect(request, progress, started)
    put(Path(bisected.folder) / "diff.json", (json.dumps(room.as_json(bisected), indent=1) + "\n").encode())
    return answer(bisected, room, output_format)


def _with_hugging_face(request: "Request", started: "Reference", python: str, device: str, output_format: o.Format) -> int:
    """Our side, llama.cpp and Hugging Face: print which one disagrees, and return the exit code."""
    from time import perf_counter

    from msgspec.structs import replace

    from ..explain.on_model import three_on
    from ..run import session
    from ..run.hugging_face import HuggingFace
    from .output import progress_bar
    from .three_way_output import finish_three

    began = perf_counter()
    with progress_bar(output_format) as progress:
        side = HuggingFace(request.model, python, device, slice_size=None if request.full else request.slice_size)
        side.check()
        outcome = session.run(request, progress, started, judge=partial(_judged, request))
        third, note = session.with_hugging_face(outcome, side, progress)
        dumps = outcome.ours, outcome.ref, third
        compared = three_on(dumps, session.comparison_options(request), request.model, request.arbiter)
    if note:
        compared = replace(compared, notes=(note, *compared.notes))
    return finish_three(replace(outcome, seconds=perf_counter() - began), third, compared, output_format)


def _two_sides(request: "Request", started: "Reference", others: "Sequence[Other]", output_format: o.Format) -> int:
    """Our side, llama.cpp and other versions of it: print the comparison, and return the exit code."""
    from ..run import session
    from .comparison_output import finish
    from .output import progress_bar

    judge = partial(_judged, request)
    references = None
    with progress_bar(output_format) as progress:
        outcome = session.run(request, progress, started, partial(_prepare, output_format), judge)
        if others:
            from ..run.references import beside

            outcome, references = beside(outcome, request, others, judge, progress)
    return finish(outcome, output_format, references)
