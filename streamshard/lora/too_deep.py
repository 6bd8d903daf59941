"""An adapter for a model of more layers than the base has: what to say instead of its many names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from streamshard.errors import printable

__all__ = ["too_deep"]

_LAYER = re.compile(r"(?:^|(?<=\.))(\d{1,6})(?=\.)")


def too_deep(names: Iterable[str], homeless: Collection[str]) -> str | None:
    """What is wrong, if all of an adapter's names that are not in the base are of further layers.

    Layers are further if the base has the same modules, but only in layers before those.
    """
    lost = {*homeless}
    found = _by_module(name for name in names if name not in lost)
    missing = _by_module(lost)
    for stem, numbers in missing.items():
        if not stem or min(numbers) <= max(found.get(stem, {min(numbers)})):
            return None
    if not missing:
        return None
    first = min(min(numbers) for numbers in missing.values())
    last = max(max(numbers) for numbers in missing.values())
    stack = next(iter(missing)).partition(".{}.")[0]
    return (
        f"has updates for layers up to {last} of '{printable(stack)}', but the base ends before layer "
        f"{first}: the adapter was trained on a larger model. Give that one as --base."
    )


def _by_module(names: Iterable[str]) -> dict[str, set[int]]:
    """Names with their first number taken out, to the numbers; "" of those that have none."""
    found: dict[str, set[int]] = {}
    for name in names:
        number = _LAYER.search(name)
        stem = "" if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        found.setdefault(stem, set()).add(0 if number is None else int(number[1]))
    return found
