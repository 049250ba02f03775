"""A model whose file is available, to be asked about a dump: the values in float64, the cost of a lower arithmetic.
Modules that compute are imported when first needed: two sides that agree need none, and importing would take longer than comparing
them.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Limits, RowLimit
from checkpoints.errors import ParityError
from checkpoints.record import Dump, Rows

from ...diff.compare import Comparison
from ...diff.limits import limits, measured_by_point

if TYPE_CHECKING:
    from engine.transformer import Transformer

    from ...arbiter.encoder_decoder import EncoderDecoderArbiter
    from ...arbiter.third_side import AnyArbiter
    from ..case import Case
    from .precision import PrecisionFloor


class KnownModel(Struct, frozen=True, dict=True):
    """What a model file tells about the reference's dump, computed on demand; nothing if our engine cannot compute the model.

    `opened` is our engine of it, if that is open; `spared` are the rows that the side under test computes in float32 (`Case.sparing`).
    """

    ref: Dump
    path: Path
    opened: "Transformer | None" = None
    spared: tuple[int, ...] = ()

    @cached_property
    def transformer(self) -> "Transformer | None":
        """Our engine of the model; None if it cannot compute it."""
        from ..case import ExplainOptions, open_model

        if self.opened is not None:
            return self.opened
        try:
            return open_model(self.path, ExplainOptions())
        except ParityError:
            return None

    @property
    def ignored(self) -> tuple[str, ...]:
        """What the metadata say and the reference computes otherwise, a sentence each."""
        from ...run.graphs import not_as_the_file_says

        return () if self.transformer is None else not_as_the_file_says(self.transformer)

    @cached_property
    def case(self) -> "Case | None":
        """The right engine beside the reference, whose tokens and positions are known, unlike those of bare lines."""
        from ..case import Case, ExplainOptions, Half

        if self.transformer is None:
            return None
        try:
            return Case(self.ref, Half(self.transformer), ExplainOptions()).sparing(self.spared)
        except ParityError:
            return None

    def beside_ours(self, ours: Dump, compared: Comparison, tokens: tuple[int, ...] = ()) -> "Case | None":
        """The right engine beside our dump, over these or the reference's tokens; None if the dump has records that do not fit them.

        Without points whose records were `compared` and show something other than their names say.
        """
        from ..case import Case, ExplainOptions, Half

        if self.transformer is None or self.ref.header is None:
            return None
        try:
            case = Case(
                _as_named(ours, compared), Half(self.transformer), ExplainOptions(tokens=tokens or self.ref.header.tokens)
            )
        except ParityError:
            return None
        return case.sparing(self.spared)

    def with_single_rows(self, ours: Dump, compared: Comparison) -> "KnownModel":
        """The model beside a side that computes single rows in float32, if its dump shows some (`in_float32`)."""
        from .single_rows import in_float32

        case = None if self.case is None else self.beside_ours(ours, compared, tuple(self.case.tokens))
        rows = in_float32(case) if case is not None else ()
        return replace(self, opened=self.transformer, spared=rows) if rows else self

    @cached_property
    def decoder(self) -> "Case | None":
        """The right decoder, fed by the right encoder, beside the reference; None if the model has none, or none was recorded."""
        if self.transformer is None or self.transformer.encoder is None:
            return None
        from ..case import ExplainOptions
        from ..half_cases import decoder_case

        try:
            return decoder_case(self.ref, self.transformer, ExplainOptions())
        except ParityError:
            return None

    @cached_property
    def encoder(self) -> "Case | None":
        """The right encoder beside the reference; None if the model has none, or none was recorded."""
        if self.transformer is None or self.transformer.encoder is None:
            return None
        from ..case import ExplainOptions
        from ..half_cases import encoder_case

        try:
            return encoder_case(self.ref, self.transformer, ExplainOptions())
        except ParityError:
            return None

    @cached_property
    def truth(self) -> "AnyArbiter | None":
        """The steps in float64 over the reference's tokens; None if our engine cannot compute the model."""
        return self.case.arbiter if self.case is not None else _of_encoder_decoder(self.ref, self.transformer)

    @property
    def started(self) -> bool:
        """Whether anything was computed in float64 so far."""
        return "truth" in self.__dict__ and self.truth is not None and self.truth.started

    def distances(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far records are from float64 (`Truth`)."""
        return {} if self.truth is None else self.truth.distances(points)

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far float32 is from float64 at records (`Truth`)."""
        return {} if self.truth is None else self.truth.own_rounding(points)

    def from_table(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far records are from float32 with ggml's tables (`Truth`)."""
        return {} if self.truth is None else self.truth.from_table(points)

    def spread(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far rounding alone moves records (`Truth`)."""
        return {} if self.truth is None else self.truth.spread(points)

    def table_spread(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far rounding moves records after a table (`Truth`)."""
        return {} if self.truth is None else self.truth.table_spread(points)

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far one entry of a table moves records (`Truth`)."""
        return {} if self.truth is None else self.truth.one_entry(points)

    def largest_entry(self, points: Mapping[str, Rows]) -> dict[str, NDArray[np.float64]]:
        """How far the entry that matters most moves records (`Truth`)."""
        return {} if self.truth is None else self.truth.largest_entry(points)

    @property
    def coarse(self) -> frozenset[str]:
        """The points that the reference itself computes coarsely."""
        return frozenset() if self.truth is None else self.truth.coarse

    @cached_property
    def _floors(self) -> "dict[str, PrecisionFloor]":
        return {}

    def floor(self, kind: str) -> "PrecisionFloor | None":
        """The error that an arithmetic costs our right engine at each record of the reference."""
        case = self.case
        if case is not None and kind not in self._floors:
            from .precision import floor

            steps, right = case.transformer.steps, case.replay
            self._floors[kind] = floor(kind, case.entries, steps, right, case.make, case.positions, spared=case.spared)
        return self._floors.get(kind)

    def limits(self, ours: Dump, kind: str, cost: "PrecisionFloor | None" = None) -> Limits | None:
        """Limits by point for a side in that arithmetic: `UPPER` times the measured cost, never below what the files' own types allow."""
        from .precision import KINDS, UPPER, of_ids

        if kind not in KINDS:
            return None
        cost = cost or self.floor(kind)
        if cost is None or self.case is None:
            return None
        header = replace(ours.header, compute="f32") if ours.header is not None else None
        types = limits(header, self.ref.header, compute="f32")
        points, rows = dict[str, float](), list[RowLimit]()
        for entry, limit in zip(self.case.entries, cost.limits(self.case.entries, UPPER), strict=True):
            points[entry.point] = 0.0 if of_ids(entry) or not len(limit) else float(limit.min())
            least = max(points[entry.point], types.at(entry.point))
            for at in np.flatnonzero(limit > least).tolist() if not of_ids(entry) else ():
                key = int(entry.pair.ours.seq[at]), int(entry.pair.ours.token_idx[at])
                rows.append(RowLimit(entry.point, *key, float(limit[at])))
        source = f"{UPPER:g} times what {kind} arithmetic costs our engine on this model and prompt, by point"
        return measured_by_point(points, types, source, rows)


def _as_named(ours: Dump, compared: Comparison) -> Dump:
    """Our dump without the points that show another layout or moment than their names say, though what is made from them agrees."""
    records = compared.records
    others = {records.names[number] for number in set(records.point[records.otherwise].tolist())}
    return replace(ours, points={name: rows for name, rows in ours.points.items() if name not in others}) if others else ours


def _of_encoder_decoder(ref: Dump, transformer: "Transformer | None") -> "EncoderDecoderArbiter | None":
    """The truth about the reference's prompt and generated tokens, if the model is an encoder–decoder."""
    if ref.header is None or not ref.header.tokens or transformer is None or transformer.encoder is None:
        return None
    from ...arbiter.encoder_decoder import EncoderDecoderArbiter
    from ..records.comparable import generated_of

    return EncoderDecoderArbiter(transformer, ref.header.tokens, generated_of(ref))
