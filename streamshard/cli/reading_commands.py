"""The commands that only read: `diff`, `inspect` and `verify`; and `env`."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

import streamshard
from streamshard.cli import texts
from streamshard.cli.app import cli
from streamshard.cli.command import CHECKS, argument, option
from streamshard.cli.diff_text import diff_text
from streamshard.cli.environment_text import environment_text
from streamshard.cli.heat_text import heat_text
from streamshard.cli.options import CACHE, COMPARING, READING, REVISION, WORKERS
from streamshard.cli.screen import begin, with_picture
from streamshard.cli.terminal_text import columns_of
from streamshard.errors import UsageError, VerificationError
from streamshard.wording import KEYWORDS, command_line

_PATH = "Checkpoint or adapter folder, or a weight file; or a model on the hub (org/name)."
_READING_CODES = ("0", "2", "3", "4", "7", "8", "9", "130", "143")
_REVISION = "Branch, tag or commit, if it is on the hub."


@cli.command("diff", codes=_READING_CODES, short_help="Compare two checkpoints.")
@argument("a", metavar="A", help="Checkpoint folder or weight file (.safetensors, .bin).")
@argument("b", metavar="B", help="Another one; names are as in its layout.")
@option(
    CHECKS,
    "--exit-code",
    is_flag=True,
    help="Exit with 8 if they differ, or if a tensor could not be compared.",
)
@option(CHECKS, "--names", is_flag=True, help="Read headers only: names, shapes, dtypes; no L2.")
@COMPARING
@CACHE
@WORKERS
@READING
def diff(
    a: str,
    b: str,
    plot: str | None,
    workers: int | None,
    cache_dir: str | None,
    *,
    exit_code: bool,
    names: bool,
    heatmap: bool,
    offline: bool,
    **output: Any,
) -> None:
    """Compare two checkpoints: names, shapes, dtypes and L2 distances, layouts reconciled.

    The first line says whether they differ.

    \b
    Examples:
      streamshard diff ./merged ./InternVL3-8B
      streamshard diff ./merged ./InternVL3-8B --heatmap
    """
    screen = begin(**output)
    if names and heatmap:
        raise UsageError(
            "--heatmap shows distances, which --names does not measure: leave one of them out."
        )
    with contextlib.closing(screen.progress) as progress, command_line(KEYWORDS["diff"]):
        report = streamshard.diff(
            a,
            b,
            names=names,
            plot=plot,
            workers=workers,
            cache_dir=cache_dir,
            offline=offline,
            on_step=progress.step,
            on_total=lambda nbytes: progress.step("comparing", nbytes),
            progress=progress.piece,
        )
    if heatmap and report["heat_map"] is not None:
        screen.heat = heat_text(report["heat_map"])
    columns = columns_of(sys.stdout)
    screen.result(report, with_picture(lambda shown: diff_text(shown, columns), plot))
    if exit_code and report["differ"]:
        raise click.exceptions.Exit(VerificationError.exit_code)


@cli.command("inspect", codes=_READING_CODES, short_help="Say what a checkpoint or adapter is.")
@argument("path", metavar="PATH", help=_PATH)
@REVISION(help=_REVISION)
@CACHE
@READING
def inspect(
    path: str, revision: str | None, cache_dir: str | None, *, offline: bool, **output: Any
) -> None:
    """Say what a checkpoint or adapter is: layout, family, dimensions, dtypes, files, LoRA state.

    Reads headers and configs only, also of a model on the hub.

    \b
    Examples:
      streamshard inspect ./InternVL3-8B --json
      streamshard inspect OpenGVLab/InternVL3-8B
    """
    screen = begin(**output)
    with command_line(KEYWORDS["inspect"]):
        report = streamshard.inspect(path, revision=revision, cache_dir=cache_dir, offline=offline)
    screen.result(report, texts.inspect_text)


@cli.command(
    "verify",
    codes=_READING_CODES,
    short_help="Read a checkpoint again and say what is wrong with it.",
)
@argument("path", metavar="PATH", help=_PATH)
@REVISION(help=_REVISION)
@CACHE
@option(
    CHECKS,
    "--sample",
    metavar="PART",
    help="Read only a part of the tensors, at random: like 10% or 200.  [default: all]",
)
@option(
    CHECKS,
    "--strict",
    is_flag=True,
    help="Exit with 8 also if there are no digests to compare with.",
)
@option(
    CHECKS,
    "--against",
    metavar="ORG/NAME@REVISION",
    help="Compare with the digests of a model on the hub too; nothing is downloaded for it.",
)
@WORKERS
@READING
def verify(
    path: str,
    revision: str | None,
    cache_dir: str | None,
    sample: str | None,
    against: str | None,
    workers: int | None,
    *,
    offline: bool,
    strict: bool,
    **output: Any,
) -> None:
    """Read a checkpoint or adapter again and say what is wrong with it.

    Checks headers, index, and infinite or NaN values; and, where streamshard wrote a
    streamshard.json: that record itself, every file and tensor with its digest, and whether code,
    weights or configs were added. Says what was compared, what could not be, and what is extra.
    Exits with 8 and lists what differs if anything is wrong, and with 7 if all that is wrong is
    that files cannot be read.

    \b
    Examples:
      streamshard verify ./merged
      streamshard verify ./merged --sample 10%
      streamshard verify ./merged --strict
      streamshard verify ./merged --against org/merged
    """
    screen = begin(**output)
    try:
        with contextlib.closing(screen.progress) as progress, command_line(KEYWORDS["verify"]):
            report = streamshard.verify(
                path,
                revision=revision,
                cache_dir=cache_dir,
                offline=offline,
                sample=sample,
                against=against,
                strict=strict,
                workers=workers,
                on_step=progress.step,
                on_total=lambda nbytes: progress.step("verifying", nbytes),
                progress=progress.piece,
            )
    except VerificationError as error:
        screen.result(error.report, texts.verify_text, error)
        seen = not (output["quiet"] or output["as_json"]) and columns_of(sys.stdout) is not None
        if seen:  # each problem, just above
            found = len(error.report["problems"])
            error.args = (f"{path}: {found} {'problem' if found == 1 else 'problems'} found.",)
        raise
    screen.result(report, texts.verify_text)


@cli.command("env", codes=("0", "2"), short_help="Say what runs here, for a bug report.")
@READING
def env(**output: Any) -> None:
    """Say what runs here, for a bug report: versions, kernel, processor, and what is not installed.

    \b
    Example:
      streamshard env
    """
    screen = begin(**output)
    with command_line(KEYWORDS["environment"]):
        report = streamshard.environment()
    screen.result(report, environment_text)
