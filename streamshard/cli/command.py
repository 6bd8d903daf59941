"""Commands whose help has its options in groups, and ends with the exit codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import click

from streamshard.cli.misuse import (
    given_twice,
    missing,
    too_many,
    unknown_command,
    unknown_option,
    without_value,
)

__all__ = [
    "CHECKS",
    "CONTEXT",
    "HUB",
    "INPUTS",
    "MEANING",
    "OUTPUT",
    "RUNNING",
    "SIZE",
    "Command",
    "Decorator",
    "Group",
    "argument",
    "option",
    "with_options",
]


CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    # Upstream's scripts spell --hf_path; both are understood everywhere.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}

INPUTS, HUB, OUTPUT, MEANING, CHECKS, RUNNING = GROUPS = (
    "Inputs",
    "Inputs on the hub",
    "Output",
    "Meaning of the adapter",
    "Checks",
    "Running",
)

EXIT_CODES = (
    ("0", "done"),
    ("1", "unexpected: a bug"),
    ("2", "usage: options that are unknown, missing, or contradict each other"),
    ("3", "input invalid: header, index, config, shapes"),
    ("4", "adapter does not fit the base, or is of a kind that is not merged"),
    ("5", "output exists, is not ours, or was begun with other inputs"),
    ("6", "no space, no memory, or write error"),
    ("7", "read error, or an input changed meanwhile"),
    ("8", "verification failed"),
    ("9", "the hub, the network or a cluster did not give what is needed"),
    ("130", "interrupted; the same command, run again, continues"),
    ("143", "terminated; likewise"),
)

_SHORT = {
    "0": "done",
    "2": "usage",
    "3": "input invalid",
    "4": "adapter does not fit",
    "5": "output exists",
    "6": "no space, no memory or write error",
    "7": "read error",
    "8": "verification failed",
    "9": "hub, network or cluster",
    "130": "interrupted",
    "143": "terminated",
}

Decorator: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]


class _Size(click.types.StringParamType):
    """Text that the library understands; here only to be told from other text."""


SIZE = _Size()


class _Option(click.Option):
    def __init__(self, *names: Any, group: str = RUNNING, **how: Any) -> None:
        super().__init__(*names, **how)
        self.group = group


class _Argument(click.Argument):
    """An argument that the help explains among the options."""

    def __init__(self, *names: Any, group: str, help: str, **how: Any) -> None:  # noqa: A002
        super().__init__(*names, **how)
        self.group, self.text = group, help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx).strip("[]"), self.text


def option(group: str, *names: str, **how: Any) -> Decorator:
    """An option of a group; where the name of its value lists values, shells complete these."""
    values = how.get("metavar", "").split("|")
    if "type" not in how and len(values) > 1:
        how["shell_complete"] = lambda _context, _parameter, begun: [
            value for value in values if value.islower() and value.startswith(begun)
        ]
    return click.option(*names, cls=_Option, group=group, **how)


def argument(name: str, **how: Any) -> Decorator:
    """An argument, with a `help`; it is an input unless the `group` says otherwise."""
    return click.argument(name, cls=_Argument, **{"group": INPUTS, **how})


def with_options(*options: Decorator) -> Decorator:
    """All of these options, which the help lists in this order."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for one in reversed(options):
            command = one(command)
        return command

    return decorate


class Command(click.Command):
    """A command with grouped options. A size may have a space before its unit: `5 GB`.

    `codes` are the exit codes that it can end with.
    """

    def __init__(self, *of: Any, codes: Collection[str] = tuple(_SHORT), **how: Any) -> None:
        super().__init__(*of, **how)
        self.codes = codes

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows.setdefault(getattr(parameter, "group", RUNNING), []).append(record)
        for group in sorted(rows, key=lambda group: group == RUNNING):  # that is the last one
            if records := rows[group]:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        told = ", ".join(f"{code} {what}" for code, what in _SHORT.items() if code in self.codes)
        more = "; streamshard --help says more" if len(self.codes) == len(_SHORT) else ""
        formatter.write_paragraph()
        formatter.write_text(f"Exit codes: {told}{more}.")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {name for one in self.get_params(ctx) if one.type is SIZE for name in one.opts}
        joined = _joined(args, names)
        wrong = without_value(joined, self, ctx) or given_twice(joined, self, ctx)
        if wrong is not None and not ctx.resilient_parsing:
            raise wrong
        rest = joined.copy()  # the parser takes from what it is given
        try:
            # Whether anything is left over is asked here, to be told better.
            allowed, ctx.allow_extra_args = ctx.allow_extra_args, True
            left = super().parse_args(ctx, joined)
            ctx.allow_extra_args = allowed
        except click.NoSuchOption as error:
            raise unknown_option(error.option_name, ctx) from None
        except click.MissingParameter:
            given, _, _ = self.make_parser(ctx).parse_args(rest)
            there = {name for name, value in given.items() if isinstance(value, str) and value}
            required = [one for one in self.get_params(ctx) if one.required]
            raise missing([one for one in required if one.name not in there], ctx) from None
        if left and not allowed and not ctx.resilient_parsing:
            raise too_many(left, ctx)
        return left


def _joined(arguments: list[str], names: set[str]) -> list[str]:
    """Arguments in which the number and the unit of a size, given as two, are one."""
    joined: list[str] = []
    for place, argument in enumerate(arguments):
        if argument == "--":
            return joined + arguments[place:]
        if joined and re.fullmatch(r"[kmgt]|[kmgt]?i?b", argument, re.IGNORECASE):
            option, _, number = joined[-1].rpartition("=")
            if not option and len(joined) > 1:
                option = joined[-2]
            if option.replace("_", "-") in names and re.fullmatch(r"[\d.]+", number):
                joined[-1] += f" {argument}"
                continue
        joined.append(argument)
    return joined


class Group(click.Group):
    """The commands, and the exit codes."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:  # as many tools have it
            args = [*args[1:], "--help"]
        try:
            return super().parse_args(ctx, args.copy())
        except click.NoSuchOption as error:
            raise unknown_option(error.option_name, ctx, args) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0].replace("_", "-")
        if name not in self.commands and not name.startswith("-") and not ctx.resilient_parsing:
            raise unknown_command(args[0], ctx, self.commands)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl(EXIT_CODES)
