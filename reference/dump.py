"""One dump of the reference: plan the graph, compute it, write each value when it is computed.

It holds one value at a time, and needs the whole model in memory; `sweep` does the same for a model that doesn't fit.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from checkpoints import points
from checkpoints.columns import open_dump
from checkpoints.dataflow import Dataflow
from checkpoints.errors import InputError
from checkpoints.fingerprint import fingerprint
from checkpoints.gguf_file import Contents
from checkpoints.jsonl import Writer
from checkpoints.record import DEFAULT_SLICE, Header, ModelInfo, Token
from checkpoints.recording import passes
from checkpoints.summary import summarise
from checkpoints.tensors import TensorWriter, beside, key

from . import twin
from .dataflow import of_passes
from .jobs import EXACT, NATIVE, DumpJob, DumpResult
from .library import Library, default_threads
from .llama import Model, Session
from .naming import Planned
from .passes import Plans, plans_of
from .rows import Survey, arrange

_TOP = 5  # logits named with each chosen token


@dataclass(frozen=True)
class Step:
    """One forward pass: its number, its first position, its tokens."""

    number: int
    first: int
    tokens: tuple[int, ...]

    @property
    def decode(self) -> bool:
        """False for the prompt's pass."""
        return self.number > 0

    @property
    def positions(self) -> NDArray[np.int64]:
        """int64 [T]."""
        return np.arange(self.first, self.first + len(self.tokens), dtype=np.int64)


def steps_of(prompt: Sequence[int], follow: Sequence[int], first: int = 0, portions: tuple[int, ...] = ()) -> list[Step]:
    """The prompt in one pass or in portions, then each further token in its own; the first token stands at position `first`.

    Raises:
        InputError: the portions do not make up the prompt.
    """
    parts = [tuple(prompt[part]) for part in passes(len(prompt), portions)] + [(token,) for token in follow]
    starts = accumulate((len(part) for part in parts), initial=first)
    return [Step(number, start, part) for number, (start, part) in enumerate(zip(starts, parts, strict=False))]


@dataclass
class Emitter:
    """Turns values into records (and whole tensors) as they come; `step` is set before each forward pass.

    `first` is where the sequence begins, if that is not the job's first position; `causal` says whether earlier positions do not
    see later ones; `before` is how many rows of other sequences precede this one's in a pass.
    """

    writer: Writer
    job: DumpJob
    tensors: TensorWriter | None = None
    step: Step = field(default_factory=lambda: Step(0, 0, ()))
    first: int | None = None
    causal: bool = True
    before: int = 0

    def __call__(self, planned: Planned, value: NDArray[np.float32]) -> None:
        """Record one value; called inside llama.cpp's callback."""
        step, keep = self.step, self._kept()
        positions = step.positions
        if planned.once:  # it belongs to the last position of the pass
            keep, positions = keep[keep == len(positions) - 1] * 0, positions[-1:]
        if not len(keep):
            return
        begin = self.first if self.first is not None else self.job.first_position
        rows_of_pass = self.before + len(step.tokens)
        tensor = arrange(planned, value, rows_of_pass, step.first - begin + rows_of_pass)
        if self.before:
            tensor = tensor[:, self.before :, self.before :] if points.of_scores(planned.point) else tensor[self.before :]
        source = planned.node if planned.operand is None else planned.node.sources[planned.operand]
        rows = summarise(
            planned.point,
            tensor,
            positions,
            step=step.number,
            decode=step.decode,
            slice_size=self.job.slice_size,
            keep=keep,
            first=begin,
            causal=self.causal,
            dtype=source.type,
        )
        self.writer.rows(rows)
        if self.tensors is not None:
            self.tensors.add(key(planned.point, step.number), tensor)

    def _kept(self) -> NDArray[np.int64]:
        count = len(self.step.tokens)
        if self.job.positions == "all":
            return np.arange(count, dtype=np.int64)
        if self.job.positions == "last":
            return np.array([count - 1], dtype=np.int64)
        return np.flatnonzero(np.isin(self.step.positions, np.array(self.job.positions))).astype(np.int64)


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


def check(job: DumpJob, model: Model) -> None:
    """Refuse a job that cannot be computed, before anything is written.

    Raises:
        InputError: no tokens, ids outside the vocabulary, too many of them, unknown mode, type or positions.
    """
    if job.mode not in (EXACT, NATIVE):
        raise InputError(f"--mode {job.mode!r} is unknown.", "Take exact or native.", code="mode")
    if job.kv_type not in ("f32", "f16") or (job.kv_type != "f32" and job.mode == EXACT):
        raise InputError(
            f"--kv-type {job.kv_type} is not available in {job.mode} mode.", "Exact mode takes f32.", code="kv_type"
        )
    if job.generate < 0:
        raise InputError(f"cannot generate {job.generate} tokens.", "Take 0 or more.", code="generate")
    if job.slice_size is not None and job.slice_size < 1:
        raise InputError(f"--slice must be at least 1, not {job.slice_size}.", "Take 1 or more.", code="slice")
    check_tokens(model, job.tokens, job.first_position + job.generate + len(job.lead or ()))
    model.checked(job.lead or ())
    if isinstance(job.positions, str):
        if job.positions not in ("all", "last"):
            raise InputError(f"--positions {job.positions!r} is not valid.", "Take all, last, or a list.", code="positions")
        return
    first = job.first_position
    last = first + len(job.tokens) + job.generate + len(job.lead or ()) - 1
    if wrong := [position for position in job.positions if not first <= position <= last]:
        raise InputError(f"there is no position {wrong[0]}.", f"The run has positions {first}…{last}.", code="positions")
    if not job.positions:
        raise InputError("--positions selects no position.", "Take all, last, or a list.", code="positions")


def check_tokens(model: Model, tokens: Sequence[int], more: int = 0) -> None:
    """Refuse tokens that the model cannot take.

    Raises:
        InputError: no tokens, ids outside the vocabulary, or more tokens than the model was trained for.
    """
    if not tokens:
        raise InputError("the prompt is empty.", "Give --prompt or --tokens.", code="prompt")
    model.checked(tokens)
    total = len(tokens) + more
    if model.n_ctx_train and total > model.n_ctx_train:
        raise InputError(
            f"{total} positions are more than the {model.n_ctx_train} for which {model.path.name} was trained.",
            "Take a shorter prompt, or generate less.",
            code="context",
        )


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
    made_from: Dataflow | None = None,
) -> Header:
    """The dump's first line."""
    build = library.versions() | {
        "threads": job.threads or default_threads(),
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
        dataflow=None if made_from is None else made_from.to_json(),
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
        header = header_of(job, info, pieces, library, None, of_passes(plans))
        names = points.select(expression(job, model.n_layers), plans.names, model.n_layers)
        planned_at = time.perf_counter()
        with open_dump(job.out, header, binary=job.binary) as writer, tensors_beside(job) as tensors:
            emitter = Emitter(writer, job, tensors, first=first, before=before)
            if plans.encoder is not None:
                emitter.step, emitter.causal = Step(0, 0, job.tokens), plans.encoder.causal
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
                step = Step(step.number + 1, position, (token,))
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


def _computed(session: Session, step: Step, plans: Plans, names: Sequence[str], emitter: Emitter, job: DumpJob) -> None:
    """Compute one pass, in the ubatches that the job asks for, together with its companions."""
    size = job.ubatch or len(step.tokens)
    ubatches = (
        Step(step.number, step.first + begin, step.tokens[begin : begin + size]) for begin in range(0, len(step.tokens), size)
    )

    def following() -> list[Planned]:
        emitter.step = next(ubatches)
        count = len(emitter.step.tokens)
        return plans.wanted(names, count=2 if job.companions else count)

    again = following if job.ubatch is not None else None
    session.decode(step.tokens, step.first, following(), emitter, again=again, companions=job.companions)


def generates(prompt: Survey, job: DumpJob, info: ModelInfo) -> None:
    """Refuse to generate with a model that scores no tokens, or not the next ones.

    Raises:
        InputError: tokens are asked for.
    """
    if not (job.generate or job.lead):
        return
    advice = "Leave --generate out."
    if all(item.point != points.LOGITS for item in prompt.known):
        raise InputError(f"{info.architecture} computes embeddings and cannot generate tokens.", advice, code="generate")
    # The mask of a single token shows nothing; but a causal model keeps what came before in a cache or a state.
    alone = len(job.tokens) == 1 and not any(_kept(item.point) for item in prompt.known)
    if alone or not prompt.causal:
        raise InputError(
            f"in {info.architecture} every position sees all others, so it cannot generate tokens.", advice, code="generate"
        )


def check_ways(plans: Plans, job: DumpJob, info: ModelInfo) -> None:
    """Refuse ubatches, sequences or a saved state for a model that cannot be computed so, or whose values could not be told apart.

    Raises:
        InputError: an encoder, or several sequences of a model with recurrent states.
    """
    if job.plain:
        return
    if plans.encoder is not None or not plans.prompt.causal:
        raise InputError(f"{info.architecture} is an encoder: it computes its whole input at once.", code="encoder")
    if job.companions and any("state" in points.parse(name).kind or "conv" in points.parse(name).kind for name in plans.names):
        raise InputError(
            f"{info.architecture} has recurrent states: sequences of unequal length are not computed in one graph.",
            code="sequences",
        )
    if (job.companions or job.saved) and (job.portions or job.ubatch or job.generate or job.lead):
        raise InputError("sequences and saved states are for a prompt in one pass.", code="ways")
    if not 0 <= job.saved < len(job.tokens):
        raise InputError(f"a state cannot be saved after {job.saved} of {len(job.tokens)} tokens.", code="ways")


def _kept(point: str) -> bool:
    """Whether a point is read from a cache, or is a recurrent state."""
    kind = points.parse(point).kind
    return kind in ("k_read", "v_read") or "cache" in kind or "state" in kind


def tensors_beside(job: DumpJob) -> AbstractContextManager[TensorWriter | None]:
    """The writer of whole tensors, if the job wants them."""
    return TensorWriter(beside(job.out)) if job.full else nullcontext()
