"""InternVL's own scripts as drop-ins: their options and printed facts, our engine."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from streamshard.cli import texts
from streamshard.cli.command import CONTEXT, INPUTS, OUTPUT, Command, argument, option
from streamshard.cli.main import main
from streamshard.cli.options import ALLOW_MISSING, ALPHA, REFERENCE
from streamshard.cli.screen import write

__all__ = ["run_upstream", "run_upstream_merge"]


def run_upstream_merge(description: str | None) -> None:
    """InternVL's merge script: its two arguments, and what our messages name; our engine."""

    @_script(description)
    @argument("input_path", metavar="INPUT_PATH", help="Training checkpoint with LoRA inside.")
    @argument("output_path", metavar="OUTPUT_PATH", group=OUTPUT, help="New folder to write.")
    @REFERENCE(
        help="The original model, for config, code and tokenizer that the trainer did not save."
    )
    @ALPHA()
    @ALLOW_MISSING
    def merge(input_path: str, output_path: str, **options: Any) -> None:
        options |= {"checkpoint": input_path, "output": output_path}
        write("merge_lora", "merging", texts.merge_text, **options)

    main(merge)


def run_upstream(function: str, description: str | None) -> None:
    """One of InternVL's conversion scripts: its options and printed facts, our engine."""
    custom, hf, new = (
        "Checkpoint in the custom layout.",
        "Checkpoint in the HF layout.",
        "New folder.",
    )

    @_script(description)
    @option(INPUTS, "--custom-path", required=True, metavar="FOLDER", help=custom)
    @option(INPUTS, "--hf-path", required=True, metavar="FOLDER", help=hf)
    @option(OUTPUT, "--save-path", required=True, metavar="FOLDER", help=new)
    def convert(**options: Any) -> None:
        write(function, "converting", texts.upstream_text, **options)

    main(convert)


def _script(description: str | None) -> Callable[[Callable[..., None]], click.Command]:
    text = description and description.replace("\n\n", "\n\n\b\n")  # lines as they are
    called = Path(sys.argv[0]).name
    if text and not called.endswith(".py"):  # installed, under a name of its own
        text = re.sub(r"^python \S+", called, text, flags=re.MULTILINE)
    return click.command(cls=Command, help=text, context_settings=CONTEXT)
