"""Values: classes that are nothing but their fields.

As `dataclasses.dataclass(frozen=True, slots=True)` in all that is done with them: fields, `replace`,
defaults, equality, hashes, text, pickles. That one writes and compiles seven methods for every class
that is imported, which took a fifth of the time before the first byte is read; here only `__init__` is
compiled, and the others are closures. That nobody sets a field is seen to by the type checker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform, overload

__all__ = ["frozen"]

T = TypeVar("T")


@overload
def frozen(cls: type[T], /) -> type[T]: ...


@overload
def frozen(
    *, eq: bool = True, kw_only: bool = False, slots: bool = True
) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(
    cls: type[T] | None = None,
    /,
    *,
    eq: bool = True,
    kw_only: bool = False,
    slots: bool = True,
) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class of annotated fields a value.

    Without `eq` it is equal to nothing but itself, with `kw_only` fields are given by their names, and
    without `slots` it can have cached properties.
    """

    def made(cls: type[T]) -> type[T]:
        done = dataclass(cls, repr=False, eq=False, slots=slots, kw_only=kw_only)
        _add(done, eq=eq)
        return done

    return made if cls is None else made(cls)


def _add(cls: Any, *, eq: bool) -> None:
    """Add what the fields decide, unless the class has it already."""
    shown = [one.name for one in fields(cls) if one.repr]
    compared = [one.name for one in fields(cls) if one.compare]
    key: Callable[[Any], Any] = attrgetter(*compared) if compared else lambda _: ()

    def text(self: Any) -> str:
        told = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__qualname__}({told})"

    def equal(self: Any, other: object) -> bool:
        return key(self) == key(other) if type(other) is type(self) else NotImplemented

    def hashed(self: Any) -> int:
        return hash(key(self))

    methods = {"__repr__": text, "__eq__": equal, "__hash__": hashed} if eq else {"__repr__": text}
    for name in methods.keys() - vars(cls).keys():
        setattr(cls, name, methods[name])
