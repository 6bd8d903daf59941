"""What every public command has around it: how it is called, and how what it says reaches the caller.

A misspelt keyword is told with the one that is meant, and a value of another type with its keyword;
`progress=True` shows a bar; a missing package is told with the command that installs it; messages are in
the caller's words (`wording`); and warnings go to `logging` and `warnings` as well, but not if the
command line calls, which prints them.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import numbers
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, cast

from streamshard.commands.hub_inputs import hub_inputs
from streamshard.commands.hub_output import hub_output
from streamshard.commands.report_html import report_html
from streamshard.disk.inputs import watched
from streamshard.engine.report import Report
from streamshard.errors import (
    StreamshardError,
    StreamshardWarning,
    UsageError,
    VerificationError,
    printable,
)
from streamshard.extras import explained, needed_for
from streamshard.limits import told
from streamshard.notes import noting
from streamshard.wording import FLAGS, KEYWORDS, is_command_line, spoken

__all__ = ["public"]

P = ParamSpec("P")

Report.as_html = staticmethod(report_html)

_LOG = logging.getLogger("streamshard")
_LOG.addHandler(logging.NullHandler())  # else Python prints what `warnings` shows already

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    # "no" and "false" would mean yes.
    **dict.fromkeys(FLAGS, ((numbers.Integral, type(None)), "True or False")),
    **dict.fromkeys(
        ("workers", "llm_r", "backbone_r"), ((numbers.Integral, type(None)), "a whole number")
    ),
    "seed": ((numbers.Integral,), "a whole number"),
    **dict.fromkeys(
        ("alpha", "llm_alpha", "backbone_alpha", "dropout"),
        ((numbers.Real, type(None)), "a number"),
    ),
    "adapter_name": ((str, type(None)), "a name"),
    "part": ((str, type(None)), "I/N or finish"),
    "scheduler": ((str, type(None)), "an address, or the name of a file,"),
    **dict.fromkeys(
        ("progress", "on_plan", "on_step", "on_total"),
        ((Callable, bool, type(None)), "a function"),  # type: ignore[arg-type]
    ),
}
"""What values are, of the keywords that do not say so themselves where they are read."""


def public(command: Callable[P, Report]) -> Callable[P, Report]:
    """A command of the Python API, which returns its report."""
    name = command.__name__
    run = told(noting(watched(command)))
    code = command.__code__
    places = code.co_varnames[: code.co_argcount]

    @functools.wraps(command)
    def call(*args: P.args, **kwargs: P.kwargs) -> Report:
        _check_keywords(name, kwargs)
        try:
            _check_values(kwargs)
            arguments = {**dict(zip(places, args, strict=False)), **kwargs}
            if len(args) > len(places) or len(arguments) < len(args) + len(kwargs):
                run(*args, **kwargs)  # which says what is wrong with that
            placed = hub_output(name, arguments)
            with hub_inputs(name, placed) as local, _progress(name, local) as given:
                report = cast("Callable[..., Report]", run)(**given)
        except ImportError as error:
            missing = explained(error)
            if missing is None:
                raise
            raise missing from error
        except StreamshardError as error:
            error.args = (spoken(str(error), name), *error.args[1:])
            if isinstance(error, VerificationError):
                _warn(_in_words(error.report, name))
            raise
        _warn(_in_words(report, name))
        return report

    return call


def _check_keywords(name: str, given: Mapping[str, object]) -> None:
    """Raise `TypeError` for a keyword that there is none of, with the one that may be meant."""
    known = KEYWORDS[name]
    for keyword in given:
        if keyword not in known:
            plain = keyword.replace("-", "_").lower()
            near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
            hint = (
                f"Did you mean '{near[0]}'?" if near else f"It knows {', '.join(known) or 'none'}."
            )
            raise TypeError(f"{name}() got an unexpected keyword argument '{keyword}'. {hint}")


def _check_values(given: Mapping[str, object]) -> None:
    """Raise `UsageError` for a value that is of no type that its keyword takes."""
    for keyword, value in given.items():
        types, what = _KINDS.get(keyword, ((object,), ""))
        if not isinstance(value, types):
            option = keyword.replace("_", "-")
            raise UsageError(f"--{option} is {printable(repr(value), 60)}; {what} was expected.")


@contextlib.contextmanager
def _progress(name: str, given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The keywords with functions in place of `progress=True`, which is a bar, and of False."""
    progress = given.get("progress")
    if not isinstance(progress, bool):
        yield given
        return
    if not progress:
        yield {**given, "progress": None}
        return
    begins = "on_plan" if "on_plan" in KEYWORDS[name] else "on_total"
    with contextlib.closing(_Bar(name, given.get(begins))) as bar:
        yield {**given, begins: bar.begin, "progress": bar.update}


class _Bar:
    """A bar of `tqdm.auto`; where it cannot be shown, the work goes on without it."""

    def __init__(self, name: str, also: Callable[[Any], None] | None) -> None:
        with needed_for("progress=True"):
            from tqdm.auto import tqdm
        self._also = also
        self._bar: Any = None
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar = tqdm(unit="B", unit_scale=True, desc=name)

    def begin(self, what: Any) -> None:
        """The total is known: bytes, or those of a plan."""
        self._do("reset", total=what if isinstance(what, int) else what.tensor_nbytes)
        if self._also is not None:
            self._also(what)

    def update(self, nbytes: int, _name: str) -> None:
        """So many bytes more are done."""
        self._do("update", nbytes)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._do("close")

    def _do(self, method: str, *values: Any, **more: Any) -> None:
        try:
            if self._bar is not None:
                getattr(self._bar, method)(*values, **more)
        except (OSError, ValueError):  # the stream is closed, or the terminal gone
            self._bar = None


def _in_words(report: dict[str, Any], name: str) -> list[str]:
    """Put what a report says of options into the caller's words; returns its warnings."""
    for key in ("warnings", "problems"):
        if report.get(key):
            report[key] = [spoken(text, name) for text in report[key]]
    return list(report["warnings"])


def _warn(found: list[str]) -> None:
    if is_command_line():
        return
    for text in found:
        _LOG.warning("%s", text)
        # At the line that called the command: of this function, and of `call`.
        warnings.warn(text, StreamshardWarning, stacklevel=3)
