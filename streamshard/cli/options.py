"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import click

import streamshard

__all__ = ["CONTEXT", "conversion_options", "output_options", "reading_options", "workers_option"]


CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    # Upstream's scripts spell --hf_path; both are understood everywhere.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Threads.  [default: one a processor, at most 8]",
)
"""Also of the commands that read all bytes."""

_Option: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]


def _with_options(command: Callable[..., None], options: Sequence[_Option]) -> Callable[..., None]:
    """A command with options, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def output_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all writing commands share."""
    options = [
        click.option(
            "--max-shard-size",
            metavar="SIZE",
            help="Split the output anew, like 5GB or 500MB.  [default: files as in the source]",
        ),
        click.option(
            "--dtype",
            metavar="|".join(["keep", *streamshard.DTYPES]),
            default="keep",
            show_default=True,
            help="Round every float tensor to this dtype, once.",
        ),
        workers_option,
        click.option(
            "--max-memory", metavar="SIZE", help="Use fewer threads to stay below this, like 512MB."
        ),
        click.option(
            "--overwrite",
            is_flag=True,
            help="Replace an output that exists, and discard what an interrupted run began otherwise.",
        ),
        click.option(
            "--sha256",
            is_flag=True,
            help="Keep the SHA-256 of every file in streamshard.json; files are read once more.",
        ),
        click.option(
            "--dry-run", is_flag=True, help="Check everything, show the plan, write nothing."
        ),
    ]
    return _with_options(reading_options(command), options)


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that only read, which the others have too."""
    options = [
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no messages but errors."),
        click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of errors."),
    ]
    return _with_options(command, options)


def conversion_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of both conversions."""
    options = [
        click.option("--save-path", required=True, metavar="FOLDER", help="New folder to write."),
        click.option(
            "--tokenizer-from",
            type=click.Choice(["source", "reference"]),
            help="Whose tokenizer belongs to the weights, if the vocabularies differ.",
        ),
        click.option(
            "--allow-missing", is_flag=True, help="Write although tensors are missing; report them."
        ),
        click.option(
            "--allow-unexpected",
            is_flag=True,
            help="Write although the source has tensors with no place; report them.",
        ),
    ]
    return _with_options(output_options(command), options)
