"""One dump of the reference: plan the graph, compute it, write each value as soon as it is computed.
This holds one value at a time, and needs the whole model in memory; `sweep` does the same for a model that does not fit.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import UTC, datetime

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints import points
from checkpoints.columns import open_dump
from checkpoints.dataflow import Dataflow
from checkpoints.errors import InputError
from checkpoints.fingerprint import fingerprint
from checkpoints.gguf_file import Contents
from checkpoints.record import ATTENTION_WINDOW, DEFAULT_SLICE, Header, ModelInfo, Token
from checkpoints.room import cores
from checkpoints.tensors import TensorWriter, beside

from . import twin
from .dataflow import of_passes
from .emitter import EmittedPass, Emitter, steps_of
from .jobs import EXACT, DumpJob, DumpResult
from .library import Library
from .model import Model
from .naming import Planned
from .passes import Plans, plans_of
from .refusals import check, check_ways, generates
from .session import Session

_TOP = 5  # logits named with each chosen token


def describe(contents: Contents, library: Library) -> ModelInfo:
    """The model that a dump names: always the original file, never its twin."""
    number = contents.integer("general.file_type")
    names = {value: name for name, value in twin.file_types(library).items()}
    kind = names.get(number, "") if number is not None else ""
    return contents.info(kind)


def expression(job: DumpJob, n_layers: int) -> str:
    """The job's `--points`, with the word "default" replaced by points of the job's `layers` if it names any.

    Raises:
        InputError: a layer that the model doesn't have.
    """
    if job.layers is None:
        return job.points
    if wrong := [layer for layer in job.layers if not 0 <= layer < n_layers]:
        raise InputError(f"the model has no layer {wrong[0]}.", f"Its layers are 0…{n_layers - 1}.", code="layers")
    named = ",".join(points.layer_outputs(job.layers))
    return ",".join(named if part.strip() == "default" else part for part in job.points.split(","))


def token_record(model: Model, position: int, chosen: int, logits: NDArray[np.float32]) -> Token:
    """A generated token and the largest logits, equal ones in the order of their ids."""
    best = np.argsort(-logits, kind="stable")[:_TOP]
    top = tuple((int(i), float(logits[i])) for i in best)
    return Token(position, chosen, (model.pieces([chosen]) or ("",))[0], top)


def header_of(
    job: DumpJob,
    info: ModelInfo,
    pieces: Sequence[str],
    library: Library,
    window: int | None,
    made_from: Dataflow,
    attention_window: int | None,
) -> Header:
    """The dump's first line; `window` counts layers that are in memory at a time, `attention_window` positions."""
    build = library.versions() | {
        "threads": job.threads or cores(),
        "flash_attention": False,
        "window": window or 0,
        "weights": "F32 twin" if job.mode == EXACT else "as in the file",
    }
    return Header(
        source="llama.cpp",
        model=info,
        tokens=job.tokens,
        pieces=tuple(pieces),
        prompt=job.prompt,
        mode=job.mode,
        compute="f32",
        kv_type=job.kv_type,
        slice=job.slice_size if job.slice_size is not None else DEFAULT_SLICE,
        hparams={ATTENTION_WINDOW: attention_window} if attention_window else None,
        dataflow=made_from.to_json(),
        build=build,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def dump_whole(library: Library, model: Model, job: DumpJob, info: ModelInfo, started: float) -> DumpResult:
    """Dump a model that is completely in memory."""
    check(job, model)
    follow = tuple(job.lead or ())
    first, prompt = job.first_position, job.tokens
    if model.encoder_decoder:
        first, prompt = 0, _decoders(model, job, info)
    n_ctx = len(job.tokens) + len(prompt) + len(follow) + job.generate
    pieces = job.pieces or model.pieces(job.tokens)
    if model.path != job.model:
        info = replace(info, twin=fingerprint(model.path))
    prompt_steps = steps_of(prompt, (), first, job.portions if model.encoder_decoder else job.passes)
    before = sum(map(len, job.companions))
    with ExitStack() as stack:

        def opened(n_ubatch: int | None = None, n_seq: int = 1) -> Session:
            count = max(len(job.tokens), len(prompt)) + before
            session = Session(
                model,
                n_ctx=n_ctx + before,
                n_batch=count,
                kv_type=job.kv_type,
                threads=job.threads,
                n_ubatch=n_ubatch,
                n_seq=n_seq,
            )
            return stack.enter_context(session)

        session = opened()
        plans = plans_of(session, prompt, job.tokens if model.encoder_decoder else (), single=job.may_step)
        check_ways(plans, job, info)
        generates(plans.prompt, job, info)
        header = header_of(job, info, pieces, library, None, of_passes(plans), model.window)
        names = points.select(expression(job, model.n_layers), plans.names, model.n_layers)
        planned_at = time.perf_counter()
        with open_dump(job.out, header, binary=job.binary) as writer, tensors_beside(job) as tensors:
            emitter = Emitter(writer, job, tensors, first=first, before=before)
            if plans.encoder is not None:
                emitter.step, emitter.causal = EmittedPass(0, 0, job.tokens), plans.encoder.causal
                session.decode(job.tokens, 0, plans.wanted(names, encoder=True), emitter, encode=True)
            chosen, generated = list[int](), list[int]()
            emitter.causal = plans.prompt.causal
            *earlier, step = prompt_steps
            if not job.plain:
                session = opened(n_ubatch=job.ubatch, n_seq=len(job.companions) + 1)
            for part in earlier:
                _computed(session, part, plans, names, emitter, job)
            if job.saved:
                earlier_session, session = session, opened()
                session.restore(earlier_session.state())
            while True:
                _computed(session, step, plans, names, emitter, job)
                if len(generated) == len(follow) + job.generate or (len(generated) > len(follow) and model.ends(generated[-1])):
                    break
                logits = session.logits()
                choice = int(logits.argmax())
                token = follow[len(generated)] if len(generated) < len(follow) else choice
                position = first + len(prompt) + len(generated)
                chosen.append(choice)
                generated.append(token)
                writer.token(token_record(model, position, token, logits))
                step = EmittedPass(step.number + 1, position, (token,))
    timings = {"prepare": planned_at - started, "compute": time.perf_counter() - planned_at}
    return DumpResult(
        out=job.out,
        header=header,
        model=info,
        computed=model.path,
        n_layers=model.n_layers,
        points=tuple(names),
        records=writer.checkpoints,
        generated=tuple(generated),
        chosen=tuple(chosen),
        pieces=pieces,
        tensors=beside(job.out) if job.full else None,
        timings=timings,
    )


def _decoders(model: Model, job: DumpJob, info: ModelInfo) -> tuple[int, ...]:
    """The tokens that a decoder takes first, if an encoder reads the prompt: its start token, and any tokens that it is led along."""
    if job.portions and not job.decoded:
        raise InputError(f"{info.architecture} is an encoder: it computes its whole input at once.", code="encoder")
    return (model.decoder_start, *model.checked(job.decoded))


def _computed(session: Session, step: EmittedPass, plans: Plans, names: Sequence[str], emitter: Emitter, job: DumpJob) -> None:
    """Compute one pass, in the ubatches that the job asks for, together with its companions."""
    size = job.ubatch or len(step.tokens)
    ubatches = (
        EmittedPass(step.number, step.first + begin, step.tokens[begin : begin + size])
        for begin in range(0, len(step.tokens), size)
    )

    def following() -> list[Planned]:
        emitter.step = next(ubatches)
        count = len(emitter.step.tokens)
        return plans.wanted(names, count=2 if job.companions else count)

    again = following if job.ubatch is not None else None
    session.decode(step.tokens, step.first, following(), emitter, again=again, companions=job.companions)


def tensors_beside(job: DumpJob) -> AbstractContextManager[TensorWriter | None]:
    """The writer of whole tensors, if the job wants them."""
    return TensorWriter(beside(job.out)) if job.full else nullcontext()
