"""InternVL's own scripts as drop-ins: their options and printed facts, our engine."""

from __future__ import annotations

from typing import Any

import click

from streamshard.cli import texts
from streamshard.cli.main import main
from streamshard.cli.options import CONTEXT
from streamshard.cli.screen import write

__all__ = ["run_upstream", "run_upstream_merge"]


def run_upstream_merge(description: str | None) -> None:
    """InternVL's merge script: its two arguments, our engine."""

    @click.command(help=description and f"\b\n{description}", context_settings=CONTEXT)
    @click.argument("input_path", metavar="INPUT_PATH")
    @click.argument("output_path", metavar="OUTPUT_PATH")
    def merge(input_path: str, output_path: str) -> None:
        write(
            "merge_lora",
            texts.merge_text,
            as_json=False,
            quiet=False,
            verbose=False,
            checkpoint=input_path,
            output=output_path,
        )

    main(merge)


def run_upstream(function: str, description: str | None) -> None:
    """One of InternVL's conversion scripts: its options and printed facts, our engine."""

    @click.command(help=description and f"\b\n{description}", context_settings=CONTEXT)
    @click.option("--custom-path", required=True, help="Checkpoint in the custom layout.")
    @click.option("--hf-path", required=True, help="Checkpoint in the HF layout.")
    @click.option("--save-path", required=True, help="New folder to write.")
    def convert(**options: Any) -> None:
        write(function, texts.upstream_text, as_json=False, quiet=False, verbose=False, **options)

    main(convert)
