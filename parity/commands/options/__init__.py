"""Options that several commands share: their choices, their declarations, their values, and the table of all."""

from .choices import AnswerFormat, Format, Mode, SideChoice
from .declared import AnswerOption, FormatOption
from .groups import fills
from .unused import refuse_unused
from .values import Given, keep_inputs

__all__ = [
    "AnswerFormat",
    "AnswerOption",
    "Format",
    "FormatOption",
    "Given",
    "Mode",
    "SideChoice",
    "fills",
    "keep_inputs",
    "refuse_unused",
]
