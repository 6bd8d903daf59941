"""What every public command has around it: how it is called, and how what it says reaches the caller.

What it is given is looked at (`arguments`); `progress=True` shows a bar; a missing package is told with
the command that installs it; messages are in the caller's words (`wording`), without the way that an
error took inside of us; and warnings go to `logging` and `warnings` as well. But if the command line
calls, it prints all of that itself.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, cast

from streamshard.commands.arguments import arguments, signature_of
from streamshard.commands.bar_of_calls import with_bar
from streamshard.commands.hub_inputs import hub_inputs
from streamshard.commands.hub_output import hub_output
from streamshard.commands.report_line import report_line
from streamshard.disk.inputs import watched
from streamshard.engine.report import Report, show_reports_by
from streamshard.errors import (
    InputError,
    NotFoundError,
    StreamshardError,
    StreamshardWarning,
    UsageError,
    VerificationError,
)
from streamshard.extras import explained
from streamshard.limits import told
from streamshard.notes import noting
from streamshard.wording import KEYWORDS, is_command_line, spoken

__all__ = ["public"]

P = ParamSpec("P")


def _html(report: Mapping[str, Any]) -> str:
    from streamshard.commands.report_html import report_html  # for notebooks

    return report_html(report)


show_reports_by(report_line, _html)

_LOG = logging.getLogger("streamshard")
_LOG.addHandler(logging.NullHandler())  # else Python prints what `warnings` shows already


def public(command: Callable[P, Report]) -> Callable[P, Report]:
    """A command of the Python API, which returns its report."""
    name = command.__name__
    run = told(noting(watched(command)))
    signature = signature_of(command)

    @functools.wraps(command)
    def call(*args: P.args, **kwargs: P.kwargs) -> Report:
        try:
            asked = arguments(name, signature, args, kwargs)
        except TypeError as error:
            raise error.with_traceback(None)  # noqa: B904 - it is the same
        except UsageError as error:
            raise _as_raised(error)  # noqa: B904 - likewise
        try:
            placed = hub_output(name, asked)
            with hub_inputs(name, placed) as local, with_bar(name, local) as given:
                report = cast("Callable[..., Report]", run)(**given)
        except ImportError as error:
            missing = explained(error)
            if missing is None:
                raise
            missing.args = (spoken(str(missing), name),)
            raise missing from error
        except StreamshardError as error:
            error.args = (spoken(str(error), name), *error.args[1:])
            if isinstance(error, VerificationError):
                _warn(_in_words(error.report, name), error.report)
            if is_command_line():
                raise
            _LOG.debug("%s raised this", name, exc_info=True)
            raise _as_raised(error)  # noqa: B904 - it is the same; its cause stays
        except BaseException as error:
            if not isinstance(error, Exception) and not is_command_line():
                _say_what_is_left(error, name)
            raise
        _warn(_in_words(report, name), report)
        return report

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _as_raised(error: StreamshardError) -> StreamshardError:
    """An error without the way that it took, and of a class that Python has for it, too."""
    if type(error) is not InputError or not error.is_missing:
        return error.with_traceback(None)
    found = NotFoundError(*error.args)
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    found.__cause__ = error.__cause__
    found.__suppress_context__ = True
    return found


def _say_what_is_left(error: BaseException, name: str) -> None:
    """What an interrupt leaves of an output, in the caller's words."""
    if any(map(str, error.args)):
        error.args = (spoken(str(error.args[0]), name), *error.args[1:])
    elif "dry_run" in KEYWORDS[name]:
        error.add_note("No weight file was finished, so nothing is kept: call it again.")


def _in_words(report: dict[str, Any], name: str) -> list[str]:
    """Put what a report says of options into the caller's words; returns its warnings."""
    for key in ("warnings", "problems"):
        if report.get(key):
            report[key] = [spoken(text, name) for text in report[key]]
    return list(report["warnings"])


def _warn(found: list[str], report: dict[str, Any]) -> None:
    """Log and warn; whoever has made errors of warnings gets the report with the first one."""
    if is_command_line():
        return
    for text in found:
        _LOG.warning("%s", text)
    for text in found:
        try:
            # At the line that called the command: of this function, and of `call`.
            warnings.warn(text, StreamshardWarning, stacklevel=3)
        except StreamshardWarning as warning:
            warning.report = report
            warning.add_note("The command itself is done; `report` of this warning is its report.")
            raise
