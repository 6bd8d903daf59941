"""The options that several commands share, each once.

Those that are not the same everywhere are functions: what a command says differently it passes on.
"""

from __future__ import annotations

from functools import partial

import click

import streamshard
from streamshard.cli.command import (
    HUB,
    INPUTS,
    MEANING,
    OUTPUT,
    RUNNING,
    SIZE,
    Decorator,
    option,
    with_options,
)

__all__ = [
    "ADAPTER_NAME",
    "ALLOW_MISSING",
    "ALLOW_UNEXPECTED",
    "ALPHA",
    "BASE",
    "CACHE",
    "CARD",
    "COMPARING",
    "CONVERSION",
    "DRAWING",
    "READING",
]
__all__ += ["REFERENCE", "REVISION", "SPLITTING", "TOKENIZER_FROM", "WORKERS", "WRITING", "output"]


BASE = partial(option, INPUTS, "--base", metavar="CHECKPOINT")
REFERENCE = partial(option, INPUTS, "--reference", metavar="FOLDER")

ALPHA = partial(
    option,
    MEANING,
    "--alpha",
    "--lora-alpha",
    type=float,
    metavar="ALPHA",
    help="Alpha of the pairs.  [default: 2 r, as InternVL's trainer has it]",
)
ADAPTER_NAME = option(
    MEANING, "--adapter-name", metavar="NAME", help="Which adapter, if a file holds several."
)

TOKENIZER_FROM = partial(
    option,
    OUTPUT,
    "--tokenizer-from",
    type=click.Choice(["source", "reference"]),
    metavar="source|reference",
    help="Whose tokenizer belongs to the weights, if the vocabularies differ.",
)


ALLOW_MISSING = option(
    OUTPUT, "--allow-missing", is_flag=True, help="Write although tensors are missing; report them."
)
ALLOW_UNEXPECTED = partial(option, OUTPUT, "--allow-unexpected", is_flag=True)


CARD = option(
    OUTPUT,
    "--card",
    type=click.Choice(["new", "base", "none"]),
    metavar="new|base|none",
    default="new",
    show_default=True,
    help="README.md: a new model card that says what was done, a copy of the one beside the config, or "
    "none.",
)

HEATMAP = option(
    OUTPUT,
    "--heatmap",
    is_flag=True,
    help="Print the same as letters: a line a module, a column a layer.",
)
PLOT = partial(option, OUTPUT, "--plot", metavar="FILE")
COMPARING = with_options(
    PLOT(help="Draw how much each module of each layer differs, into a .png, .svg or .pdf."),
    HEATMAP,
)
DRAWING = with_options(
    PLOT(
        help="Draw how much each module of each layer has changed, into a .png, .svg or .pdf; with "
        "--part when the output is complete.",
    ),
    HEATMAP,
)

CACHE = with_options(
    option(
        HUB,
        "--cache-dir",
        metavar="FOLDER",
        help="The hub's cache.  [default: as HF_HOME and HF_HUB_CACHE say]",
    ),
    option(HUB, "--offline", is_flag=True, help="Ask the hub nothing; use what is in the cache."),
)
"""How models on the hub are got."""
REVISION = partial(
    option,
    HUB,
    "--revision",
    metavar="REVISION",
    help="Branch, tag or commit of the base, if it is on the hub.",
)

WORKERS = option(
    RUNNING,
    "--workers",
    type=int,
    metavar="N",
    help="Threads, 1 to 64.  [default: one a processor, at most 8]",
)

READING = with_options(
    option(RUNNING, "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    option(
        RUNNING,
        "-q",
        "--quiet",
        is_flag=True,
        help="Print nothing but errors; the exit code says the rest.",
    ),
    option(
        RUNNING,
        "-v",
        "--verbose",
        is_flag=True,
        help="Show also tracebacks of errors, and what libraries log.",
    ),
)
"""Also of the commands that write."""

SPLITTING = partial(
    option,
    OUTPUT,
    "--max-shard-size",
    type=SIZE,
    metavar="SIZE",
    help="Split the output anew, like 5GB, 500MB, 2GiB.  [default: files as in the source]",
)
WRITING = with_options(
    option(
        OUTPUT,
        "--dtype",
        metavar="|".join(["keep", *streamshard.DTYPES]),
        default="keep",
        show_default=True,
        help="Round every float tensor to this dtype, once; bfloat16 and the like are understood.",
    ),
    option(
        OUTPUT,
        "--overwrite",
        is_flag=True,
        help="Replace an output that exists, and discard what an interrupted run began otherwise.",
    ),
    option(
        OUTPUT,
        "--sha256",
        is_flag=True,
        help="Keep the SHA-256 of every file in streamshard.json, and compare inputs in the hub's cache "
        "with that of the hub; files are read once more.",
    ),
    option(
        RUNNING,
        "--part",
        metavar="I/N|finish",
        help="Write the I-th of N parts, on one of several machines that share the output's disk (with "
        "--push-to alone, that of the folder they run in); the last one completes it, or finish does.",
    ),
    option(
        RUNNING,
        "--scheduler",
        metavar="ADDRESS|FILE.json",
        help="Have the workers of a Dask cluster write it; they share the disks of inputs and output.",
    ),
    option(
        RUNNING,
        "--dry-run",
        is_flag=True,
        help="Check everything, show the plan, and what would be continued; write nothing.",
    ),
    WORKERS,
    option(
        RUNNING,
        "--max-memory",
        type=SIZE,
        metavar="SIZE",
        help="Use fewer threads to stay below this, like 512MB.",
    ),
    option(
        RUNNING,
        "--io",
        metavar="auto|buffered|direct",
        default="auto",
        show_default=True,
        help="Write through the page cache or around it; auto goes around with what is large against "
        "the memory that is free. Same bytes.",
    ),
    REVISION(),
    CACHE,
    option(
        HUB,
        "--stream",
        is_flag=True,
        help="Read models on the hub as they are needed, and never store their weights.",
    ),
    option(
        HUB,
        "--push-to",
        metavar="ORG/NAME",
        help="Upload each finished file, and commit all at the end; the output stays here only with "
        "a folder for it.",
    ),
    option(HUB, "--private", is_flag=True, help="With --push-to: make a new repository private."),
    option(
        HUB,
        "--commit-message",
        metavar="WORDS",
        help="Of what --push-to commits.",
    ),
    READING,
)
"""Of all commands that write."""


def output(help: str, name: str = "output", **how: object) -> Decorator:  # noqa: A002
    """Where the output goes; `name` is the keyword."""
    options = ("-o", "--output", "--save-path")
    return option(OUTPUT, name, *options, metavar="FOLDER", help=help, **how)


CONVERSION = with_options(
    output("New, or empty, folder to write.", "save_path"),
    TOKENIZER_FROM(),
    ALLOW_MISSING,
    ALLOW_UNEXPECTED(help="Write although the source has tensors with no place; report them."),
    CARD,
    DRAWING,
    SPLITTING(),
    WRITING,
)
"""Of both conversions."""
