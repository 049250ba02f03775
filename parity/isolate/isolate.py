"""`parity isolate`: llama.cpp's own operations, or a foreign engine's (`foreign`), judged by their inputs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.isolate import NOT_OBSERVABLE, WRONG, Isolation, Operation
from checkpoints.errors import InputError
from engine.replay.proof import proof_steps
from reference.client import Reference
from reference.jobs import DumpJob

from ..models.embedded import path as default_model
from ..run.request import Prompt
from ..run.session import resolve_prompt
from .bench import IsolationBench, feed
from .foreign import of_dump
from .remarks import ignored, named, not_checked
from .request import LIMIT, LIMIT_SOURCE, IsolateRequest, started
from .standards import Define, reference_standard
from .values import RecordedValue, WholeValues

__all__ = ["LIMIT", "IsolateRequest", "isolate"]

# An operation is not called wrong under this many times the worst one of the embedded model on this machine.
_FLOOR_FACTOR = 10.0
_CALIBRATION = tuple(range(1, 9))  # any eight tokens will do: operations are judged one by one


def isolate(request: IsolateRequest, running: Reference | None = None, define: Define = proof_steps) -> Isolation:
    """Judge every operation of llama.cpp, or of a foreign engine's dump, by its own inputs.

    `running` is a reference that was started already and is left running; without it one is started if needed.
    `define` gives the steps that llama.cpp's own operations are judged by.

    Raises:
        ParityError: anything wrong with the request, the model, the dump or the reference, in one line.
    """
    if request.dump is not None:
        return of_dump(request, request.dump, running)
    if request.graft:
        raise InputError(
            "--graft needs an external engine's dump.", "Give the dump: parity isolate DUMP --graft …", code="graft"
        )
    mode = request.mode or "native"
    if mode == "exact" and request.kv_type != "f32":
        raise InputError("exact mode uses an F32 cache.", "Leave --kv-type out, or use --mode native.", code="kv_type")
    with started(request, running) as reference:
        graph = partial(reference.graph, request.model, mode)
        prompt = resolve_prompt(reference, request.model, request.prompt, request.tokens)
        expected = len(prompt.ids) + request.generate
        standard = reference_standard(define, native=mode == "native", kv_type=request.kv_type)
        bench = IsolationBench.of(request.model, graph, standard, LIMIT, expected, request.rows)
        bench.transformer.check(prompt.ids, 0)
        passes = _feed_reference(reference, request, prompt, mode, bench)
        build = reference.versions()
        otherwise = ignored(bench.transformer, reference)
        operations = _without_blas(bench.operations(), build.get("devices", ()))
        floor = None
        if any(operation.status == WRONG for operation in operations):
            floor = calibrate(reference, mode, request.kv_type, define)
            operations = [_above(operation, floor) for operation in operations]
    return Isolation(
        judged=f"llama.cpp {build['llama_cpp_python']}",
        model=named(bench.transformer),
        mode=mode,
        kv_type=request.kv_type,
        positions=len(prompt.ids),
        passes=passes,
        limit=LIMIT,
        limit_source=LIMIT_SOURCE,
        operations=tuple(operations),
        floor=floor,
        findings=tuple(bench.attention.findings),
        not_checked=tuple(not_checked(operations, passes, request.kv_type)),
        elements=tuple(bench.rows.elements),
        facts={
            "backends": ", ".join(build.get("devices", ())) or build["backend"],
            "attention": bench.attention.sentence(),
            "metadata": otherwise,
        },
    )


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
        return feed(bench, values, np.array(prompt.ids), values.generated)


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
