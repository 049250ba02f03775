"""The operations of a foreign engine's dump, each judged by its own recorded inputs."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Limits
from checkpoints.answers.isolate import NOT_OBSERVABLE, WRONG, Graft, Isolation, Operation
from checkpoints.errors import DumpError, InputError
from checkpoints.graph import RecordedGraph
from checkpoints.mapping import Mapping
from checkpoints.points import ENCODER
from checkpoints.record import Header
from engine.graph import in_one_pass
from reference.client import Reference

from ..diff.limits import limits
from ..diff.measured.tokens import other_settings, same_model
from ..run.session import resolve_prompt
from .arithmetic import Judgement, in_its_arithmetic
from .bench import IsolationBench, feed
from .judged_layers import eliminated, graft, judged_layers
from .remarks import ignored, named, not_checked, other_pairs
from .request import LIMIT, LIMIT_SOURCE, IsolateRequest, started
from .standards import foreign_standard
from .suspicions import as_eight_bits, in_order, of_cache, of_open_cache, of_stated_cache, proven_within
from .unrecorded import pass_over
from .values import WholeValues


def of_dump(request: IsolateRequest, dump: Path, running: Reference | None) -> Isolation:
    """Judge a dump, from position 0 if it begins later and fewer operations are wrong then: some engines number lines from 1."""
    values = WholeValues(dump, request.tensors, request.mapping)
    isolation = _judged(request, values, running)
    mapping, first = request.mapping or Mapping(), values.first
    if not (first and isolation.wrong and mapping.position_offset is None):
        return isolation
    from_zero = WholeValues(dump, request.tensors, replace(mapping, position_offset=-first))
    moved = _judged(request, from_zero, running)
    if len(moved.wrong) >= len(isolation.wrong):
        return isolation
    note = f"moved by {-first:+d}: the dump begins at position {first}, where more operations would be wrong"
    return replace(moved, facts={**moved.facts, "positions": note})


class _Run(Struct, dict=True):
    """A dump of a foreign engine, the reference that is started once it is needed, and what the dump says of the run."""

    request: IsolateRequest
    values: WholeValues
    stack: ExitStack
    running: Reference | None

    @cached_property
    def header(self) -> Header:
        return self.values.dump.header or Header(source="")

    @cached_property
    def kv_type(self) -> str:
        return self.header.kv_type or "f32"

    @cached_property
    def mode(self) -> str:
        return self.request.mode or self.header.mode or "exact"

    @cached_property
    def reference(self) -> Reference:
        """Operations are judged without it where the model's steps need no graph."""
        return self.stack.enter_context(started(self.request, self.running))

    @cached_property
    def graph(self) -> RecordedGraph:
        return self.reference.graph(self.request.model, self.mode)

    @cached_property
    def allowed(self) -> Limits:
        """The limit of operations in F32, whatever the file's types: their rounding is part of the definitions."""
        return limits(
            replace(self.header, mode="exact", kv_type=""),
            replace(self.header, mode="exact", compute="f32", kv_type=""),
            compute=self.request.compute,
        )

    @cached_property
    def tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The prompt's ids, and those generated after it: all of those that were given, if any were."""
        if self.request.prompt is None and self.request.tokens is None:
            return self.values.prompt(), self.values.generated
        prompt = resolve_prompt(self.reference, self.request.model, self.request.prompt, self.request.tokens)
        return np.array(prompt.ids, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def judged_at(self, limit: float, lower: Sequence[str] = (), *, open_cache: bool = False) -> Judgement:
        """Every operation, by its own inputs."""
        request, values, (tokens, generated) = self.request, self.values, self.tokens
        cache_type = "" if open_cache or (self.allowed.assumed and not self.header.kv_type) else self.kv_type
        standard = foreign_standard(native=self.mode == "native", kv_type=cache_type)
        expected = len(tokens) + len(generated)
        bench = IsolationBench.of(request.model, lambda: self.graph, standard, limit, expected, request.rows, lower)
        later = generated if bench.encoder is None else values.generated
        bench.transformer.check([*tokens.tolist(), *later.tolist()], 0)
        if values.unshaped:
            values.with_shapes(dict(self.reference.describe(request.model).points))
        values.two_sided = ("",) if in_one_pass(bench.isolator.definitions[0].several) else (ENCODER,)
        lacking = pass_over(bench, values, self.mode, self.kv_type)
        passes = feed(bench, values, tokens, later)
        operations = of_stated_cache(bench.operations(), bench.isolators, self.header.kv_type)
        return Judgement(bench, in_order([*operations, *lacking], bench.steps), passes, limit)

    def with_layers(self, judgement: Judgement) -> tuple[list[Operation], list[Operation]]:
        """The operations and, where some cannot be observed, the layers that they are in, judged by llama.cpp's own."""
        bench, operations, request = judgement.bench, judgement.operations, self.request
        cache = judgement.cache or self.header.kv_type
        layers: list[Operation] = []
        if request.windows and any(item.status == NOT_OBSERVABLE and item.layer is not None for item in operations):
            layers, suspects = judged_layers(
                self.reference,
                request.model,
                self.values,
                operations,
                self.mode,
                max(judgement.of_layers, of_cache(cache)),  # llama.cpp's own layer has a cache of F32
                bench.isolator.suspects(),
                bench.rounding,
            )
            operations = bench.isolator.unless_of(suspects, operations)
            layers = proven_within(eliminated(operations, layers, suspects), judgement.of_layers, cache)
        if self.allowed.assumed:
            judged = as_eight_bits([*operations, *layers], judgement.scaled)
            operations, layers = judged[: len(operations)], judged[len(operations) :]
        return operations, layers

    def grafted(self, bench: IsolationBench) -> list[Graft]:
        """llama.cpp from the dump's own values on, where that was asked for."""
        if not self.request.graft:
            return []
        tokens, generated = self.tokens
        given = np.concatenate([tokens, generated if bench.encoder is None else self.values.generated])
        return graft(self.reference, bench.transformer, self.values, given, self.request.graft, self.mode)


def _judged(request: IsolateRequest, values: WholeValues, running: Reference | None) -> Isolation:
    same_model(values.dump, request.model)
    if request.rows and not any("logits" in values.points(step) for step in values.passes):
        raise InputError(
            "--rows needs whole logits, which the dump does not have.",
            "Record them: `parity dump ours --full`, or all values of each record.",
        )
    with ExitStack() as stack:
        run = _Run(request, values, stack, running)
        tokens, generated = run.tokens
        judgement = in_its_arithmetic(run.judged_at, run.allowed, LIMIT, LIMIT_SOURCE, open_cache=not run.header.kv_type)
        if not run.header.kv_type:
            judgement = of_open_cache(judgement)
        bench = judgement.bench
        operations, layers = run.with_layers(judgement)
        build = run.reference.versions() if layers else {}
        grafted = run.grafted(bench)
        differs = any(item.status == WRONG for item in (*operations, *layers))
        otherwise = ignored(bench.transformer, run.reference) if differs or bench.transformer.recorded is not None else ""
    if all(item.nmse is None for item in (*operations, *layers)) and not grafted:
        raise DumpError(
            f"{values.path} has no operation whose inputs and output were recorded as whole rows.",
            'Record whole values: a tensors file, or all values of each record and their "shape": [width] (parity emit shows how).',
            code="nothing",
        )
    later = generated if bench.encoder is None else values.generated
    return Isolation(
        judged=run.header.source or Path(values.path).name,
        model=named(bench.transformer),
        mode=run.mode,
        kv_type=run.kv_type,
        positions=len(tokens) + len(later),
        passes=judgement.passes,
        limit=judgement.limit,
        limit_source=judgement.source,
        operations=(*operations, *layers),
        findings=tuple(bench.attention.findings),
        not_checked=tuple(not_checked(operations, judgement.passes, request.kv_type, foreign=True)),
        elements=tuple(bench.rows.elements),
        graft=tuple(grafted),
        graft_from=request.graft or "",
        facts={
            "judge of layers": f"llama.cpp {build['llama_cpp_python']}" if layers else "",
            "layout": other_pairs(bench.isolators),
            "attention": bench.attention.sentence(),
            "metadata": "; ".join(part for part in (*other_settings(values.dump, request.model), otherwise) if part),
        },
    )
