"""`parity isolate`: gets the values and turns them into an answer."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.isolate import NOT_OBSERVABLE, WRONG, Graft, Isolation, Operation
from checkpoints.errors import DumpError, InputError
from checkpoints.mapping import Mapping
from checkpoints.points import ENCODER
from checkpoints.record import Header
from engine.graph import in_one_pass
from engine.replay.proof import proof_steps
from engine.transformer import Transformer
from reference.client import Reference
from reference.jobs import NATIVE, DumpJob
from reports.numbers import count

from ..diff.limits import limits
from ..diff.tokens import other_settings, same_model, too_few_tokens
from ..models.embedded import path as default_model
from ..run.graphs import not_as_the_file_says
from ..run.request import Prompt
from ..run.session import resolve_prompt
from .arithmetic import Judgement, in_its_arithmetic
from .bench import IsolationBench
from .judged_layers import eliminated, graft, judged_layers
from .standards import Define, foreign_standard, reference_standard
from .suspicions import as_eight_bits, in_order, of_cache, of_stated_cache, proven_within
from .unrecorded import pass_over
from .values import RecordedValue, WholeValues

# Measured: llama.cpp's CPU backend, 24 layers, 28 tokens, caches of F32 and F16; the worst operation of F32, F16, BF16, Q8_0,
# Q4_0, Q4_1, Q5_0, Q5_1, Q2_K … Q6_K, IQ4_NL and IQ4_XS lies at 3e-13 at most.
LIMIT = 1e-10
LIMIT_SOURCE = "right operations were off by 1e-12 at most, in every type"
# An operation is not called wrong under this many times the worst one of the embedded model on this machine.
_FLOOR_FACTOR = 10.0
_CALIBRATION = tuple(range(1, 9))  # any eight tokens will do: operations are judged one by one


class IsolateRequest(Struct, frozen=True):
    """The request of `parity isolate`; with `dump` a foreign engine's whole values are judged, else llama.cpp's."""

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    mode: str = ""
    kv_type: str = "f32"
    generate: int = 0
    rows: tuple[int, ...] = ()
    dump: Path | None = None
    tensors: Path | None = None
    mapping: Mapping | None = None
    compute: str | None = None
    windows: bool = True
    graft: str | None = None
    threads: int | None = None
    verbose: bool = False


def isolate(request: IsolateRequest, running: Reference | None = None, define: Define = proof_steps) -> Isolation:
    """Judge every operation of llama.cpp, or of a foreign engine's dump, by its own inputs.

    `running` is a reference that was started already and is left running; without it one is started if needed.
    `define` gives the steps that llama.cpp's own operations are judged by.

    Raises:
        ParityError: anything wrong with the request, the model, the dump or the reference, in one line.
    """
    if request.dump is not None:
        return _as_counted(request, request.dump, running)
    if request.graft:
        raise InputError(
            "--graft needs an external engine's dump.", "Give the dump: parity isolate DUMP --graft …", code="graft"
        )
    mode = request.mode or "native"
    if mode == "exact" and request.kv_type != "f32":
        raise InputError("exact mode uses an F32 cache.", "Leave --kv-type out, or use --mode native.", code="kv_type")
    with _started(request, running) as reference:
        graph = partial(reference.graph, request.model, mode)
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
        expected = len(prompt.ids) + request.generate
        standard = reference_standard(define, native=mode == "native", kv_type=request.kv_type)
        bench = IsolationBench.of(request.model, graph, standard, LIMIT, expected, request.rows)
        bench.transformer.check(prompt.ids, 0)
        passes = _feed_reference(reference, request, prompt, mode, bench)
        build = reference.versions()
        otherwise = _ignored(bench.transformer, reference)
        operations = _without_blas(bench.operations(), build.get("devices", ()))
        floor = None
        if any(operation.status == WRONG for operation in operations):
            floor = calibrate(reference, mode, request.kv_type, define)
            operations = [_above(operation, floor) for operation in operations]
    return Isolation(
        judged=f"llama.cpp {build['llama_cpp_python']}",
        model=_named(bench.transformer),
        mode=mode,
        kv_type=request.kv_type,
        positions=len(prompt.ids),
        passes=passes,
        limit=LIMIT,
        limit_source=LIMIT_SOURCE,
        operations=tuple(operations),
        floor=floor,
        findings=tuple(bench.attention.findings),
        not_checked=tuple(_not_checked(operations, passes, request.kv_type)),
        elements=tuple(bench.rows.elements),
        facts={
            "backends": ", ".join(build.get("devices", ())) or build["backend"],
            "attention": bench.attention.sentence(),
            "metadata": otherwise,
        },
    )


def _ignored(transformer: Transformer, reference: Reference) -> str:
    return "; ".join(not_as_the_file_says(transformer, partial(reference.graph, transformer.model.path, NATIVE)))


def _started(request: IsolateRequest, running: Reference | None) -> AbstractContextManager[Reference]:
    return Reference(verbose=request.verbose, threads=request.threads) if running is None else nullcontext(running)


def _feed_reference(reference: Reference, request: IsolateRequest, prompt: Prompt, mode: str, bench: IsolationBench) -> int:
    """Let llama.cpp compute the prompt (and what it generates) and judge each pass; returns the number of passes."""
    points = "all"  # values that are not needed are ignored
    positions = np.arange(len(prompt.ids), dtype=np.int64)
    if not request.generate and bench.encoder is None:
        captured = reference.capture(request.model, prompt.ids, points, mode, kv_type=request.kv_type, threads=request.threads)
        bench.run(np.array(prompt.ids), positions, ((node.point, RecordedValue(value, positions)) for node, value in captured))
        return 1
    with TemporaryDirectory(prefix="parity-isolate-") as folder:
        job = DumpJob(
            request.model,
            Path(folder) / "ref.jsonl",
            prompt.ids,
            prompt.text,
            prompt.pieces,
            mode=mode,
            points=points,
            slice_size=1,
            full=True,
            generate=request.generate,
            window="off",
            threads=request.threads,
            kv_type=request.kv_type,
        )
        reference.dump(job)
        values = WholeValues(job.out)
        return _feed_dump(values, bench, np.array(prompt.ids), values.generated)


def _feed_dump(values: WholeValues, bench: IsolationBench, prompt: NDArray[np.int64], generated: NDArray[np.int64]) -> int:
    computed = [step.makes for step in bench.steps]
    if bench.encoder is not None:
        bench.encode(prompt, values.arriving(values.passes[0], computed, encoder=True))
    tokens = bench.decoded(prompt, generated)
    first = values.first
    bench.attention.first = first
    for step in values.passes:
        positions = values.positions(step)
        if not len(positions):
            continue  # of an encoder's pass alone
        if int(positions.max()) - first >= len(tokens):
            raise too_few_tokens(values.path, int(positions.max()), len(tokens), decoder=bench.encoder is not None)
        bench.run(tokens[positions - first], positions, values.arriving(step, computed))
    return len(values.passes)


def calibrate(reference: Reference, mode: str, kv_type: str, define: Define = proof_steps) -> float:
    """The worst NMSE of any operation of the embedded model on this machine, whose operations are known to be right."""
    model = default_model()
    graph = partial(reference.graph, model, mode)
    standard = reference_standard(define, native=mode == "native", kv_type=kv_type)
    bench = IsolationBench.of(model, graph, standard, LIMIT, len(_CALIBRATION))
    request = IsolateRequest(model, tokens=_CALIBRATION, kv_type=kv_type)
    _feed_reference(reference, request, Prompt(None, _CALIBRATION, ()), mode, bench)
    return max((operation.nmse or 0.0 for operation in bench.operations()), default=0.0)


def _above(operation: Operation, floor: float) -> Operation:
    if operation.status != WRONG or operation.nmse is None or operation.nmse > _FLOOR_FACTOR * floor:
        return operation
    reason = (
        f"its error of {operation.nmse:.1e} is no larger than that of right operations of the embedded model here ({floor:.1e})"
    )
    return replace(operation, status=NOT_OBSERVABLE, reason=reason)


def _without_blas(operations: list[Operation], devices: Sequence[str]) -> list[Operation]:
    """The operations, with products that a BLAS library may have computed not called wrong: it rounds in its own way."""
    if "BLAS" not in devices:
        return operations
    reason = "this llama.cpp computes products with BLAS, which rounds differently"
    return [
        replace(operation, status=NOT_OBSERVABLE, reason=reason)
        if operation.status == WRONG and operation.weight
        else operation
        for operation in operations
    ]


def _as_counted(request: IsolateRequest, dump: Path, running: Reference | None) -> Isolation:
    """Judge a dump, from position 0 if it begins later and fewer operations are wrong then: some engines number lines from 1."""
    values = WholeValues(dump, request.tensors, request.mapping)
    isolation = _foreign(request, values, running)
    mapping, first = request.mapping or Mapping(), values.first
    if not (first and isolation.wrong and mapping.position_offset is None):
        return isolation
    from_zero = WholeValues(dump, request.tensors, replace(mapping, position_offset=-first))
    moved = _foreign(request, from_zero, running)
    if len(moved.wrong) >= len(isolation.wrong):
        return isolation
    note = f"moved by {-first:+d}: the dump begins at position {first}, where more operations would be wrong"
    return replace(moved, facts={**moved.facts, "positions": note})


def _foreign(request: IsolateRequest, values: WholeValues, running: Reference | None) -> Isolation:
    header = values.dump.header or Header(source="")
    same_model(values.dump, request.model)
    if request.rows and not any("logits" in values.points(step) for step in values.passes):
        raise InputError(
            "--rows needs whole logits, which the dump does not have.",
            "Record them: `parity dump ours --full`, or all values of each record.",
        )
    kv_type = header.kv_type or "f32"
    mode = request.mode or header.mode or "exact"
    # The limit of operations in F32, whatever the file's types: their rounding is part of the definitions.
    measured = limits(
        replace(header, mode="exact", kv_type=""),
        replace(header, mode="exact", compute="f32", kv_type=""),
        compute=request.compute,
    )
    layers: list[Operation] = []
    grafted: list[Graft] = []
    build: dict[str, Any] = {}
    with ExitStack() as stack:

        @cache
        def reference() -> Reference:
            """A reference, started only if needed: operations are judged without it."""
            return stack.enter_context(_started(request, running))

        graph = cache(lambda: reference().graph(request.model, mode))
        if request.prompt is not None or request.tokens is not None:
            prompt = resolve_prompt(reference(), request.model, request.prompt, request.tokens)
            tokens, generated = np.array(prompt.ids, dtype=np.int64), np.zeros(0, dtype=np.int64)
        else:
            tokens, generated = values.prompt(), values.generated
        cache_type = "" if measured.assumed and not header.kv_type else kv_type
        standard = foreign_standard(native=mode == "native", kv_type=cache_type)

        def judged_at(limit: float, lower: Sequence[str] = ()) -> Judgement:
            expected = len(tokens) + len(generated)
            bench = IsolationBench.of(request.model, graph, standard, limit, expected, request.rows, lower)
            later = generated if bench.encoder is None else values.generated
            bench.transformer.check([*tokens.tolist(), *later.tolist()], 0)
            if values.unshaped:
                values.with_shapes(dict(reference().describe(request.model).points))
            values.two_sided = ("",) if in_one_pass(bench.isolator.definitions[0].several) else (ENCODER,)
            lacking = pass_over(bench, values, mode, kv_type)
            passes = _feed_dump(values, bench, tokens, later)
            operations = of_stated_cache(bench.operations(), bench.isolators, header.kv_type)
            return Judgement(bench, in_order([*operations, *lacking], bench.steps), passes, limit)

        judgement = in_its_arithmetic(judged_at, measured, LIMIT, LIMIT_SOURCE)
        bench, operations = judgement.bench, judgement.operations
        if bench.encoder is not None:
            generated = values.generated
        if request.windows and any(item.status == NOT_OBSERVABLE and item.layer is not None for item in operations):
            layers, suspects = judged_layers(
                reference(),
                request.model,
                values,
                operations,
                mode,
                max(judgement.of_layers, of_cache(header.kv_type)),  # llama.cpp's own layer has a cache of F32
                bench.isolator.suspects(),
                bench.rounding,
            )
            operations = bench.isolator.unless_of(suspects, operations)
            layers = proven_within(eliminated(operations, layers, suspects), judgement.of_layers, header.kv_type)
            build = reference().versions()
        if measured.assumed:
            judged = as_eight_bits([*operations, *layers], judgement.scaled)
            operations, layers = judged[: len(operations)], judged[len(operations) :]
        if request.graft:
            grafted = graft(reference(), bench.transformer, values, np.concatenate([tokens, generated]), request.graft, mode)
        differs = any(item.status == WRONG for item in (*operations, *layers))
        otherwise = _ignored(bench.transformer, reference()) if differs or bench.transformer.recorded is not None else ""
    if all(item.nmse is None for item in (*operations, *layers)) and not grafted:
        raise DumpError(
            f"{values.path} has no operation whose inputs and output were recorded as whole rows.",
            'Record whole values: a tensors file, or all values of each record and their "shape": [width] (parity emit shows how).',
            code="nothing",
        )
    return Isolation(
        judged=header.source or Path(values.path).name,
        model=_named(bench.transformer),
        mode=mode,
        kv_type=kv_type,
        positions=len(tokens) + len(generated),
        passes=judgement.passes,
        limit=judgement.limit,
        limit_source=judgement.source,
        operations=(*operations, *layers),
        findings=tuple(bench.attention.findings),
        not_checked=tuple(_not_checked(operations, judgement.passes, request.kv_type, foreign=True)),
        elements=tuple(bench.rows.elements),
        graft=tuple(grafted),
        graft_from=request.graft or "",
        facts={
            "judge of layers": f"llama.cpp {build['llama_cpp_python']}" if layers else "",
            "attention": bench.attention.sentence(),
            "metadata": "; ".join(part for part in (*other_settings(values.dump, request.model), otherwise) if part),
        },
    )


def _named(transformer: Transformer) -> str:
    hp = transformer.hp
    return f"{hp.name or transformer.model.path.stem} · {hp.architecture}, {hp.n_layers} layers · {hp.file_type}"


def _not_checked(operations: Sequence[Operation], passes: int, kv_type: str, *, foreign: bool = False) -> Iterator[str]:
    """Sentences on what this run does not check."""
    hidden = [operation for operation in operations if operation.status == NOT_OBSERVABLE]
    if hidden:
        yield f"{count(len(hidden), 'operation')} not observable"
    if passes == 1:
        yield "decode steps" + ("" if foreign else " (--generate 4 adds them)")
    yield "the tokenizer (parity tokens)" + (
        ", and weights as your engine loaded them (parity weights --theirs)" if foreign else ""
    )
    if not foreign and kv_type == "f32":
        yield "a KV cache of F16 (--kv-type f16)"
    if not foreign:
        yield "flash attention and other backends than the CPU"
