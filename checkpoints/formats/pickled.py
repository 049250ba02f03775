"""The description in a file of `torch.save`: instructions of a pickle, of which nothing is imported or called.

They are interpreted one by one, and only the few that build dictionaries, lists and tuples; everything else that a description names (a
class of somebody's engine) becomes an `Opaque` value.
"""

from collections.abc import Callable
from typing import Any

from msgspec import Struct

_STEPS = 1 << 20  # instructions of a description: twenty for each of 50,000 tensors


class Opaque(Struct, frozen=True):
    """A value of a class that is not known here; only its name is kept."""

    name: str


def structure(description: bytes, storage: Callable[[Any], Any], call: Callable[[Any, Any], Any]) -> Any:
    """What a description describes. `storage` makes a value of what identifies a storage, `call` of a function and its arguments.

    Raises:
        ValueError: the description is invalid. The parser raises others.
    """
    import pickletools

    stack = _Stack(storage, call)
    for number, (opcode, argument, _) in enumerate(pickletools.genops(description)):
        if number > _STEPS:
            raise ValueError("its description is too long")
        if opcode.name == "STOP":
            return stack.values.pop()
        if (instruction := _INSTRUCTIONS.get(opcode.name)) is None:
            raise ValueError(f"its description has the instruction {opcode.name}")
        instruction(stack, argument)
    raise ValueError("its description does not end")


class _Stack:
    """What the instructions work on: values, the marks between them, and those that are remembered by number."""

    def __init__(self, storage: Callable[[Any], Any], call: Callable[[Any, Any], Any]) -> None:
        self.values: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}
        self._storage = storage
        self._call = call

    def push(self, value: Any) -> None:
        self.values.append(value)

    def above_mark(self) -> list[Any]:
        """The values above the last mark, taken off."""
        mark = self.marks.pop()
        items = self.values[mark:]
        del self.values[mark:]
        return items

    def name_class(self) -> None:
        last, module = self.values.pop(), self.values.pop()
        if not isinstance(last, str) or not isinstance(module, str):
            raise ValueError("it names a class by something other than text")  # noqa: TRY004  # a file's fault
        self.push(Opaque(f"{module}.{last}"))

    def join(self, count: int) -> None:
        self.values[-count:] = [tuple(self.values[-count:])]

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.values[-1], list):
            raise ValueError("its description appends to something other than a list")  # noqa: TRY004  # a file's fault
        self.values[-1].extend(items)

    def enter(self, items: list[Any]) -> None:
        """Enter keys and values, in turn, into the dictionary on top."""
        if not isinstance(self.values[-1], dict):
            raise ValueError("its description sets items of something other than a dictionary")  # noqa: TRY004  # a file's fault
        self.values[-1].update((key_of(key), item) for key, item in zip(items[::2], items[1::2], strict=True))

    def enter_one(self) -> None:
        item, key = self.values.pop(), self.values.pop()
        self.enter([key, item])

    def call(self) -> None:
        arguments, function = self.values.pop(), self.values.pop()
        self.push(self._call(function, arguments))

    def open_storage(self) -> None:
        self.push(self._storage(self.values.pop()))


def key_of(value: Any) -> Any:
    """A key of a dictionary; a deeply nested tuple would take for ever to hash, or exhaust the stack."""
    if isinstance(value, tuple):
        raise ValueError("a key of its dictionaries is a tuple")  # noqa: TRY004  # a file's fault
    return value


_Instruction = Callable[[_Stack, Any], Any]


def _each(names: str, instruction: _Instruction) -> dict[str, _Instruction]:
    return dict.fromkeys(names.split(), instruction)


_INSTRUCTIONS: dict[str, _Instruction] = {
    **_each("PROTO FRAME", lambda stack, _: None),
    "NONE": lambda stack, _: stack.push(None),
    "NEWTRUE": lambda stack, _: stack.push(True),
    "NEWFALSE": lambda stack, _: stack.push(False),
    **_each("BININT BININT1 BININT2 LONG1 BINFLOAT", lambda stack, number: stack.push(number)),
    **_each("BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES", lambda stack, text: stack.push(text)),
    "EMPTY_DICT": lambda stack, _: stack.push({}),
    "EMPTY_LIST": lambda stack, _: stack.push([]),
    "EMPTY_TUPLE": lambda stack, _: stack.push(()),
    "MARK": lambda stack, _: stack.marks.append(len(stack.values)),
    **_each("BINPUT LONG_BINPUT PUT", lambda stack, number: stack.memory.update({int(number): stack.values[-1]})),
    "MEMOIZE": lambda stack, _: stack.memory.update({len(stack.memory): stack.values[-1]}),
    **_each("BINGET LONG_BINGET GET", lambda stack, number: stack.push(stack.memory[int(number)])),
    "GLOBAL": lambda stack, name: stack.push(Opaque(str(name).replace(" ", "."))),
    "STACK_GLOBAL": lambda stack, _: stack.name_class(),
    "TUPLE1": lambda stack, _: stack.join(1),
    "TUPLE2": lambda stack, _: stack.join(2),
    "TUPLE3": lambda stack, _: stack.join(3),
    "TUPLE": lambda stack, _: stack.push(tuple(stack.above_mark())),
    "LIST": lambda stack, _: stack.push(stack.above_mark()),
    "APPEND": lambda stack, _: stack.extend([stack.values.pop()]),
    "APPENDS": lambda stack, _: stack.extend(stack.above_mark()),
    "SETITEM": lambda stack, _: stack.enter_one(),
    "SETITEMS": lambda stack, _: stack.enter(stack.above_mark()),
    "BINPERSID": lambda stack, _: stack.open_storage(),
    **_each("REDUCE NEWOBJ", lambda stack, _: stack.call()),
    "BUILD": lambda stack, _: stack.values.pop(),  # attributes of an object: none that matter here
}
