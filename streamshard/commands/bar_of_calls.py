"""The bar that `progress=True` shows, of `tqdm.auto`: in a terminal, a log or a notebook."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from streamshard.extras import needed_for
from streamshard.wording import KEYWORDS

__all__ = ["with_bar"]


@contextlib.contextmanager
def with_bar(name: str, given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The keywords with functions in place of `progress=True`, which is a bar, and of False."""
    progress = given.get("progress")
    if not isinstance(progress, bool):
        yield given
        return
    if not progress:
        yield {**given, "progress": None}
        return
    begins = "on_plan" if "on_plan" in KEYWORDS[name] else "on_total"
    with contextlib.closing(_Bar(name, given.get(begins), given.get("on_step"))) as bar:
        yield {**given, begins: bar.begin, "on_step": bar.step, "progress": bar.update}


class _Bar:
    """A bar from when it is known how much there is to do; without one the work goes on as well."""

    def __init__(
        self,
        name: str,
        also: Callable[[Any], None] | None,
        also_step: Callable[[str, int, int], None] | None,
    ) -> None:
        with needed_for("progress=True"):
            from tqdm.auto import tqdm
        self._make = tqdm
        self._name = name
        self._also, self._also_step = also, also_step
        self._bar: Any = None

    def begin(self, what: Any) -> None:
        """The total is known: bytes, or those of a plan."""
        total = what if isinstance(what, int) else what.tensor_nbytes
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar = self._make(total=total, unit="B", unit_scale=True, desc=self._name)
        if self._also is not None:
            self._also(what)

    def step(self, what: str, nbytes: int, done: int) -> None:
        """Something else is begun; hashing, and measuring for a picture, were not planned."""
        if what in ("hashing", "measuring") and self._bar is not None:
            self._bar.total += nbytes - done
            self._do("refresh")
        if self._also_step is not None:
            self._also_step(what, nbytes, done)

    def update(self, nbytes: int, _name: str) -> None:
        """So many bytes more are done."""
        self._do("update", nbytes)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._do("close")

    def _do(self, method: str, *values: Any) -> None:
        try:
            if self._bar is not None:
                getattr(self._bar, method)(*values)
        except (OSError, ValueError):  # the stream is closed, or the terminal gone
            self._bar = None
