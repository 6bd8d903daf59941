"""A value does what a frozen dataclass with slots does, which is asked here beside it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, fields, replace

import pytest

from streamshard.values import frozen


class Base:
    __slots__ = ()


def _fields(decorate):
    @decorate
    class Pair(Base):
        """Two, and what does not count."""

        a: int
        b: tuple[int, ...] = (1, 2)
        seen: list[int] = field(default_factory=list, compare=False, repr=False)

        def sum(self) -> int:
            return self.a + sum(self.b)

    return Pair


OURS, THEIRS = _fields(frozen), _fields(dataclass(frozen=True, slots=True))


@frozen
class Nothing:
    """No fields."""


@frozen
class Other:
    """A like one of another class."""

    a: int


@frozen(eq=False, kw_only=True)
class Alone:
    """Equal to nothing else."""

    a: int


@frozen(slots=False)
class Told:
    """With a text of its own."""

    a: int

    def __repr__(self) -> str:
        return "told"


@pytest.mark.parametrize("kind", [OURS, THEIRS])
def test_it_is_as_a_frozen_dataclass(kind):
    one = kind(3)
    assert one == kind(3, (1, 2), [7]) != kind(3, (2, 1))
    assert len({one, kind(3, seen=[5]), kind(4)}) == 2
    assert hash(one) == hash((3, (1, 2)))
    assert repr(one) == "_fields.<locals>.Pair(a=3, b=(1, 2))"
    assert [part.name for part in fields(kind)] == ["a", "b", "seen"]
    assert replace(one, a=4) == kind(4)
    assert one.sum() == 6
    assert kind.__slots__ == ("a", "b", "seen")
    assert not hasattr(one, "__dict__")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        kind()


def test_what_a_class_says_itself_stays():
    assert repr(Told(1)) == "told"
    assert Told(1) == Told(1)
    assert Told(1).__dict__ == {"a": 1}


def test_those_that_differ():
    assert Alone(a=1) != Alone(a=1)
    assert Other(1) != OURS(1)
    assert Nothing() == Nothing() != Other(1)
    assert repr(Nothing()) == "Nothing()"
    with pytest.raises(TypeError):
        Alone(1)


def test_it_can_be_pickled():
    assert pickle.loads(pickle.dumps(Other(2))) == Other(2)


def test_type_checkers_let_nobody_set_a_field():
    assert frozen.__dataclass_transform__["kwargs"]["frozen_default"]
