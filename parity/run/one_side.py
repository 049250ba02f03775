"""`parity dump`: one side alone, into one file."""

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from checkpoints.errors import DumpError, InputError
from checkpoints.points import expand
from checkpoints.record import Dump
from reference.client import Reference
from reference.jobs import DumpResult

from ..diff.measured.tokens import same_model
from .request import Progress, Prompt, Request
from .session import following, resolve_prompt
from .sides import LlamaCpp, OurEngine


def dump_ours(request: Request, out: Path, progress: Progress | None = None) -> None:
    """`parity dump ours`: our side alone."""
    with Reference(verbose=request.verbose) as reference:
        side = OurEngine(request, reference)
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
    side.check(prompt)
    side.dump(prompt, out, progress)


def dump_hugging_face(model: Path, given: dict[str, Any], out: Path, progress: Progress | None = None) -> str:
    """`parity dump hf`: Hugging Face alone. Returns a sentence if its tokenizer gives other ids than llama.cpp's, else "".

    Raises:
        InputError: the interpreter has no transformers, or the prompt of a folder is given as neither text nor ids.
        EngineError: transformers cannot load or run the model.
    """
    from .hugging_face import HuggingFace

    side = HuggingFace(
        model,
        given["python"],
        given["device"],
        _listed(given["points"]),
        None if given["full"] else given["slice_size"],
        positions=given["positions"] if isinstance(given["positions"], str) else ",".join(map(str, given["positions"])),
    )
    if model.is_dir():
        if not (model / "config.json").is_file():
            raise InputError(
                f"{model} has no config.json.", "Use a GGUF file, or a folder that `save_pretrained` wrote.", code="model"
            )
        prompt = Prompt(given["prompt"], given["tokens"] or (), ())
        side.check(prompt)
        tokenizer = side.dump(prompt, out, progress)
        return "" if prompt.ids or not tokenizer.problem else tokenizer.problem
    with Reference() as reference:
        prompt = resolve_prompt(reference, model, given["prompt"], given["tokens"])
    side.check(prompt)
    tokenizer = side.dump(prompt, out, progress)
    return tokenizer.difference(prompt) if given["prompt"] is not None and given["tokens"] is None else ""


def _listed(points: str) -> str:
    """A `--points` expression as names and wildcards with commas, "" for all: the model's points are only known when it runs."""
    return "" if points == "all" else ",".join(expand(points))


def dump_reference(request: Request, out: Path, follow: Dump | None = None) -> DumpResult:
    """`parity dump ref`: llama.cpp alone, on a prompt, or on the tokens, points and positions of another dump.

    Raises:
        DumpError: the dump to follow does not list its tokens, or llama.cpp has none of its points.
    """
    with Reference(verbose=request.verbose, threads=request.threads) as reference:
        if follow is None:
            prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
            return LlamaCpp(request, reference).dump(prompt, out)
        same_model(follow, request.model)
        if request.prompt is None and request.tokens is None:
            request = replace(request, **_prompt_of(follow))
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
        if follow.tokens:
            prompt = prompt.followed_by(tuple(token.id for token in follow.tokens), ())
        known = [name for name, _ in reference.describe(request.model).points]
        request = replace(request, first_position=request.first_position or _first_position(follow))
        return LlamaCpp(following(request, follow, prompt, known), reference).dump(prompt, out)


def _first_position(dump: Dump) -> int:
    """Where the first token of a dump stands, if as many positions in a row were recorded as the dump has tokens; else 0."""
    recorded = {int(position) for rows in dump.points.values() for position in rows.token_idx}
    count = len(dump.header.tokens if dump.header is not None else ()) + len(dump.tokens)
    return min(recorded) if recorded and max(recorded) - min(recorded) + 1 == count else 0


def _prompt_of(dump: Dump) -> dict[str, Any]:
    if dump.header is not None and dump.header.tokens:
        return {"tokens": dump.header.tokens, "prompt": dump.header.prompt}
    if dump.header is not None and dump.header.prompt:
        return {"prompt": dump.header.prompt}
    raise DumpError(
        f"{dump.path} does not say which tokens it was recorded for.", "Give --prompt or --tokens as well.", code="tokens"
    )
