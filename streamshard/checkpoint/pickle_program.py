"""The program of a pickle as torch writes it, run without calling anything that it names.

A pickle says which functions are to be called. Here no name is ever looked up: what is not torch's way
to describe a tensor becomes an `Unknown` that knows its name, and so does whatever is made of that. So a
file of anybody can be looked at, and the tensors in it be found, whatever else it holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from streamshard.values import frozen

__all__ = ["Described", "PickleError", "Storage", "Unknown", "run_program"]


MAX_STEPS = 2_500_000  # 46 a tensor: more than 50,000 of these in a file
MAX_NUMBER_NBYTES = 16  # sizes and offsets have 8

_PLAIN = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
)
_REBUILT = ("torch._utils._rebuild_", "torch._tensor._rebuild_")


class PickleError(ValueError):
    """The program is not one that torch writes; the message says what is wrong."""


@frozen
class Unknown:
    """Something other than tensors and plain values, by the name of its class or function."""

    name: str


@frozen
class Storage:
    """Where a tensor's elements lie: the name of an entry, of which class, on which device."""

    kind: str
    key: str
    device: str
    elements: int


@frozen
class Described:
    """A tensor as a pickle describes it; `dtype` is torch's word, "" if the storage's class says it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str = ""


def run_program(program: bytes, tensors: list[Described | Unknown] | None = None) -> Any:
    """What a pickle describes: dicts, lists, tuples, plain values, `Described` and `Unknown`.

    Every tensor of it is added to `tensors`, those too that lie within objects or are of a kind that is
    not known here. Raises `PickleError`.
    """
    machine = _Machine(program, [] if tensors is None else tensors)
    try:
        return machine.run()
    except PickleError:
        raise
    except (IndexError, struct.error, KeyError, TypeError, ValueError) as error:
        raise PickleError(f"it is damaged near its byte {machine.at:,}") from error


class _Mark:
    """Where values that belong together begin on the stack."""


_MARK = _Mark()


class _Machine:
    """A stack, and what was stored under numbers; steps of the program change them."""

    def __init__(self, program: bytes, tensors: list[Described | Unknown]) -> None:
        self.program = program
        self.tensors = tensors
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        program, steps = self.program, _STEPS
        for _ in range(MAX_STEPS):
            code = program[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise PickleError(f"it has the step {bytes([code])!r}, which torch does not use")
            step(self)
        raise PickleError(f"it has more than {MAX_STEPS:,} steps")

    def take(self, nbytes: int) -> bytes:
        """So many bytes of the program."""
        found = self.program[self.at : self.at + nbytes]
        if len(found) < nbytes:
            raise PickleError("it is cut off")
        self.at += nbytes
        return found

    def number(self, how: struct.Struct) -> Any:
        return how.unpack(self.take(how.size))[0]

    def line(self) -> str:
        end = self.program.index(b"\n", self.at, self.at + 1000)
        found = self.program[self.at : end].decode()
        self.at = end + 1
        return found

    def marked(self) -> list[Any]:
        """What is on the stack above the last mark, which is taken off with it."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def put_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                # Of keys that are made of parts, hashing may take for ever; no file needs them.
                target[key if isinstance(key, (str, int, float)) else len(target)] = value
        elif not isinstance(target, Unknown):
            raise PickleError("it puts items into what takes none")

    def add_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target += values
        elif not isinstance(target, Unknown):
            raise PickleError("it appends to what is no list")


def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.stack.append(Unknown(f"{module}.{machine.line()}"))


def _named(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Unknown(f"{module}.{name}"))


def _persistent(machine: _Machine) -> None:
    found = machine.stack.pop()
    word, kind, key, device, elements = found
    if word != "storage" or not isinstance(kind, Unknown) or type(elements) is not int:
        raise PickleError("it refers to something that is no storage of torch")
    machine.stack.append(Storage(kind.name, str(key), str(device), elements))


def _call(machine: _Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    name = function.name if isinstance(function, Unknown) else type(function).__name__
    if not isinstance(arguments, tuple):
        raise PickleError(f"it calls {name} with no arguments")
    made = _made(name, arguments)
    if isinstance(made, Described) or (
        isinstance(made, Unknown) and made.name.startswith(_REBUILT)
    ):
        machine.tensors.append(made)
    machine.stack.append(made)


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call of torch's way to describe values stands for."""
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name in _PARAMETERS and arguments:
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
        # A tensor that somebody gave attributes of its own.
        function, kind, inner, _ = arguments
        plain = isinstance(kind, Unknown) and kind.name in _PLAIN
        if plain and isinstance(function, Unknown) and isinstance(inner, tuple):
            return _made(function.name, inner)
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        storage, offset, shape, stride, _, _, *more = arguments
        dtype = ""
        if name.endswith("v3"):
            dtype, *more = (more[0].name, *more[1:]) if isinstance(more[0], Unknown) else ("?",)
        # Marks of views that negate or conjugate, or the like of a later torch.
        plain = not any(more) and isinstance(storage, Storage) and type(offset) is int
        sizes = [shape, stride]
        if plain and all(
            isinstance(s, tuple) and all(type(n) is int and n >= 0 for n in s) for s in sizes
        ):
            return Described(storage, offset, shape, stride, dtype)
    return Unknown(name)


def _build(machine: _Machine) -> None:
    machine.stack.pop()  # the state of an object, of which none is ever made


def _long(machine: _Machine) -> None:
    count = machine.take(1)[0]
    if count > MAX_NUMBER_NBYTES:
        raise PickleError("it has a number that is too large")
    machine.stack.append(int.from_bytes(machine.take(count), "little", signed=True))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        first = len(machine.stack) - count
        if first < 0:
            raise IndexError
        machine.stack[first:] = [tuple(machine.stack[first:])]

    return step


def _push(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(make())

    return step


def _number(form: str) -> Callable[[_Machine], None]:
    how = struct.Struct(form)

    def step(machine: _Machine) -> None:
        machine.stack.append(machine.number(how))

    return step


def _text(form: str, *, binary: bool = False) -> Callable[[_Machine], None]:
    how = struct.Struct(form)

    def step(machine: _Machine) -> None:
        found = machine.take(machine.number(how))
        machine.stack.append(found if binary else found.decode())

    return step


def _put(form: str) -> Callable[[_Machine], None]:
    how = struct.Struct(form)

    def step(machine: _Machine) -> None:
        machine.memo[machine.number(how)] = machine.stack[-1]

    return step


def _get(form: str) -> Callable[[_Machine], None]:
    how = struct.Struct(form)

    def step(machine: _Machine) -> None:
        machine.stack.append(machine.memo[machine.number(how)])

    return step


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _new(machine: _Machine) -> None:
    _, kind = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(kind if isinstance(kind, Unknown) else Unknown("an object"))


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.put_items([key, value])


def _append(machine: _Machine) -> None:
    machine.add_items([machine.stack.pop()])


_STOP = ord(".")
# By the letters that Python's pickletools lists; those of protocol 2, which torch writes, and the
# few more of protocol 4.
_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord(letter): step
    for letter, step in {
        "\x80": lambda m: m.take(1),
        "\x95": lambda m: m.take(8),
        "}": _push(dict),
        "]": _push(list),
        ")": _push(tuple),
        "\x8f": _push(list),
        "(": _push(lambda: _MARK),
        "N": _push(lambda: None),
        "\x88": _push(lambda: True),
        "\x89": _push(lambda: False),
        "K": _number("<B"),
        "M": _number("<H"),
        "J": _number("<i"),
        "G": _number(">d"),
        "\x8a": _long,
        "X": _text("<I"),
        "\x8c": _text("<B"),
        "U": _text("<B", binary=True),
        "T": _text("<I", binary=True),
        "C": _text("<B", binary=True),
        "B": _text("<I", binary=True),
        "t": lambda m: m.stack.append(tuple(m.marked())),
        "l": lambda m: m.stack.append(m.marked()),
        "\x85": _tuple_of(1),
        "\x86": _tuple_of(2),
        "\x87": _tuple_of(3),
        "q": _put("<B"),
        "r": _put("<I"),
        "\x94": _memoize,
        "h": _get("<B"),
        "j": _get("<I"),
        "s": _set_item,
        "u": lambda m: m.put_items(m.marked()),
        "a": _append,
        "e": lambda m: m.add_items(m.marked()),
        "\x90": lambda m: m.add_items(m.marked()),
        "0": lambda m: m.stack.pop(),
        "c": _global,
        "\x93": _named,
        "Q": _persistent,
        "R": _call,
        "\x81": _new,
        "b": _build,
    }.items()
}
