"""The choices that an option offers."""

from enum import StrEnum


class Format(StrEnum):
    """How an answer is printed."""

    TEXT = "text"
    JSON = "json"


class AnswerFormat(StrEnum):
    """How a comparison's answer is printed, including CI's formats."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    JUNIT = "junit"
    GITHUB = "github"


class Mode(StrEnum):
    """What is compared: F32 copies on both sides, or the file's own types."""

    EXACT = "exact"
    NATIVE = "native"


class SideChoice(StrEnum):
    """Which side computes."""

    OURS = "ours"
    REF = "ref"


class BackendName(StrEnum):
    """Where our engine computes."""

    AUTO = "auto"
    CUPY = "cupy"
    NUMPY = "numpy"


class Compute(StrEnum):
    """The arithmetic of an external engine."""

    F32 = "f32"
    TF32 = "tf32"
    F16 = "f16"
    BF16 = "bf16"
    Q8 = "q8"


class ArbiterChoice(StrEnum):
    """When the same steps in float64 decide which side is right."""

    OFF = "off"
    AUTO = "auto"
    ALL = "all"
