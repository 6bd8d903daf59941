"""In which ways the names of an adapter may differ from those of a base, all of them in one way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from streamshard.tensor_names import without_wrappers
from streamshard.values import frozen

__all__ = ["REWRITES", "PartRewrite", "part_rewrites"]


def _as_named(name: str) -> str:
    return name


def _without_model(name: str) -> str:
    return name.removeprefix("model.")


# Ways in which the whole model may be called otherwise.
REWRITES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("as named", _as_named),
    ("without leading 'model.'", _without_model),
    ("with leading 'model.'", lambda name: f"model.{name}"),
    ("without leading 'language_model.'", lambda name: name.removeprefix("language_model.")),
    ("with leading 'language_model.'", lambda name: f"language_model.{name}"),
)


@frozen
class PartRewrite:
    """`removed` is taken from the beginning of a name in some form, and `added` put there."""

    form: Callable[[str], str]
    removed: str
    added: str

    @property
    def how(self) -> str:
        """What messages call it."""
        if self.removed:
            return f"without leading '{self.removed}'"
        return f"with leading '{self.added}'" if self.added else "without words of training"

    def __call__(self, name: str) -> str:
        formed = self.form(name)
        if not formed.startswith(self.removed):
            return ""
        return self.added + formed.removeprefix(self.removed)


def part_rewrites(
    base: Iterable[str], example: str, spelled: Callable[[str], str]
) -> Iterator[tuple[Mapping[str, str], PartRewrite]]:
    """Rewrites that bring one name of an adapter to one of the base, as a part or a whole of it.

    With each come the names of the base in the spelling that it is for, to those that it has. A
    part has no number in what is before it: the choice of one layer would be a guess.
    """
    names = list(base)
    tables = [_table(names, _as_named), _table(names, lambda n: spelled(without_wrappers(n)))]
    for known in tables:
        for form in (_as_named, spelled, _without_model):
            end, mark, _ = form(example).partition(".experts.")
            for removed, added in _ends(known, end + mark):
                yield known, PartRewrite(form, removed, added)


def _table(names: Iterable[str], change: Callable[[str], str]) -> dict[str, str]:
    """Changed names to those of the base; without those that two of them would have."""
    found: dict[str, str] = {}
    twice = set()
    for name in names:
        changed = change(name)
        if found.setdefault(changed, name) != name:
            twice.add(changed)
    return {
        changed: name for changed, name in found.items() if changed not in twice or changed == name
    }


def _ends(known: Mapping[str, str], example: str) -> Iterator[tuple[str, str]]:
    """What must be before or away so that the example is a name, or (`.experts.`) begins some."""
    stack = example.endswith(".")
    found = {""}
    ends = f".{example}"
    for name in known:
        at = name.find(ends) if stack else len(name) - len(ends)
        if at > 0 and name.startswith(ends, at):
            found.add(name[: at + 1])
        elif stack and name.startswith(example):
            found.add("")
    yield from (("", part) for part in sorted(found) if not _has_number(part))
    words = example.split(".")
    for count in range(1, len(words)):
        removed = ".".join(words[:count]) + "."
        rest = example.removeprefix(removed)
        there = any(name.startswith(rest) for name in known) if stack else rest in known
        if there and rest and not _has_number(removed):
            yield removed, ""


def _has_number(part: str) -> bool:
    return re.search(r"(?:^|\.)\d+\.", part) is not None
