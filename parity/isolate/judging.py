"""The data with which operations are judged: the right definitions, the records so far, the memory of earlier passes."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from msgspec import Struct, field

from engine import ops
from engine.graph import Step, WeightSource

from ..diff.readings.rounding import is_rounding
from ..diff.verdict.one_factor import shared_factor
from ..diff.verdict.scatter import SIMILAR, is_scaled, is_scatter
from .held import Held
from .inputs import PassMemory, Program
from .values import RecordedValue

# A norm is one scale per row, not a sum of many products: right ones measured 3e-14 at most, and another epsilon, the smallest
# known fault, makes only 1e-12 where activations are large.
_NORM_LIMIT = 1e-12
# How much larger the error of a stretch of operations may be than that of one: scores are rounded, and soft max amplifies it. Engines
# that sum in another order measured 1.4e-14 at most (qwen2, qwen3, gpt-oss, gemma2, gemma3, llama4, cohere2, deepseek2, random
# weights); scores of 100, rounded to float32, make it 4e-11.
STRETCH = 3.0
NORMS = (ops.rms_norm, ops.layer_norm)
# Of an operation that read NaN at every position.
NOT_FINITE = "its inputs are not finite"


class Definition(Struct, frozen=True, dict=True):
    """A model's right steps: of a pass over several tokens, and of a pass over a single token if that is another list.

    `arithmetic` is the lower one in which they multiply ("f16"), "" for that of the mode.
    """

    several: Sequence[Step]
    single: Sequence[Step] | None = None
    passed_over: Collection[str] = ()
    arithmetic: str = ""

    @cached_property
    def programs(self) -> tuple[Program, Program]:
        """The programs of several tokens and of one."""
        several = Program(self.several, self.passed_over)
        return several, several if self.single is None else Program(self.single, self.passed_over)

    def of(self, tokens: int) -> Program:
        """The steps of a pass over so many tokens."""
        return self.programs[tokens == 1]


class Record(Struct):
    """What the passes so far have shown about one operation."""

    nmse: float = -1.0
    position: int | None = None
    passes: int = 0
    sampled: float | None = None
    reason: str = ""
    wrong: bool = False
    # If only a definition that rounds activations, as the mode does not, makes the recorded value: NMSE of the one that does not.
    unrounded: float | None = None
    # The lower arithmetics in which its value is nearest; whether wrong rows are noise, or all the right ones times about one factor.
    arithmetics: dict[str, None] = field(default_factory=dict)
    scattered: bool = True
    scaled: bool = True
    # Whether every row is wrong, by noise of about one size that has no factor of its own; the lower arithmetic whose rounding of what was
    # not recorded may be all of it (None before any is wrong).
    noisy: bool = True
    within: str | None = None
    lower: str = ""  # the type to which the right value was rounded, where nothing else is wrong with what was recorded
    denied_by: dict[str, None] = field(default_factory=dict)  # operations that read the right value, not the recorded one
    read_by: dict[str, None] = field(default_factory=dict)  # operations that read the recorded value, and not the right one
    pairs: str = ""  # the other order of RoPE's pairs in which the right value was recorded
    as_recorded: float = 0.0  # NMSE without that; 0 if the record follows from those of its inputs
    reordered: dict[str, float] = field(
        default_factory=dict
    )  # choices that it read in another order; NMSE by the recorded order

    def note_wrong(self, held: Held, limit: float) -> None:
        """Add what a wrong value beside the right one looks like."""
        rows, right = held.wrong_rows(limit)
        self.wrong = True
        self.within = held.within if self.within in (None, held.within) else ""
        self.scattered &= is_scatter(rows, right) and not held.spares_elements()
        # A scale of 1.00001 is lost in F16: that is one factor for all values, too.
        self.scaled &= is_scaled(rows, right) and not is_rounding(rows, right)
        alike = limit < held.errors.min() and held.errors.max() <= SIMILAR * held.errors.min()
        self.noisy &= self.scattered and alike and shared_factor(rows - right, right) is None


class Judging(Struct):
    """The state of an isolation over all passes.

    Args:
        definitions: one or more right definitions of the model (with and without ggml's rounding, for example); an operation
            is judged by the nearest of them.
        limit: NMSE above which an operation is wrong.
        stretches: operations that are judged together with others before them, whose values were not recorded.
    """

    definitions: Sequence[Definition]
    weights: WeightSource
    limit: float
    sample: bool = True
    stretches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=lambda: defaultdict(Record))
    memory: PassMemory = field(default_factory=PassMemory)
    # Values that every pass reads and none makes: an encoder's output.
    given: dict[str, RecordedValue] = field(default_factory=dict)
    epsilons: set[float] = field(default_factory=set)  # the wrong epsilons that norms have shown

    def limit_of(self, step: Step) -> float:
        """The NMSE above which this operation is wrong."""
        if step.makes in self.stretches:
            return STRETCH * self.limit
        return _NORM_LIMIT if step.op in NORMS and self.limit <= 1e-10 else self.limit
