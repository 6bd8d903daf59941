"""`hf_to_custom` and `custom_to_hf`: the conversions of the Python API.

They return the report, a mapping; its keys are those of the command line's `--json`.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Literal, Unpack

from streamshard.checkpoint.folder import open_checkpoint
from streamshard.checkpoint.shards import shard_names
from streamshard.commands.bare_names import with_bare_names
from streamshard.commands.carry_over import Differences, carry_over
from streamshard.commands.drawing import Drawing
from streamshard.commands.identify import Model
from streamshard.commands.left_behind import note_left_behind
from streamshard.commands.model_card import check_card, conversion_card, with_card
from streamshard.commands.public import public
from streamshard.disk.paths import PathLike
from streamshard.engine.job import Job, Options, OutputOptions
from streamshard.engine.output_path import check_places
from streamshard.engine.report import Report
from streamshard.internvl.detection import layout_of
from streamshard.internvl.families import Layout
from streamshard.lora.base_checks import check_base
from streamshard.notes import note
from streamshard.values import frozen

__all__ = ["ConversionOptions", "custom_to_hf", "hf_to_custom"]


class ConversionOptions(OutputOptions, total=False):
    """Keywords of the conversions, beside their paths and those of `OutputOptions`.

    - `tokenizer_from`: "source" or "reference": whose tokenizer is meant where the vocabularies differ.
    - `allow_missing`: write although tensors are missing; the report lists them.
    - `allow_unexpected`: write although the source has tensors with no place; the report lists them.
    - `card`: the model card: "new" (default) says what was done, "base" is the reference's, "none".
    - `plot`: a file (.png, .svg, .pdf) for a picture of the distance from the reference's weights.
    - `heatmap`: have the relative change of each module in each layer in the report, as `heat_map`.
    """

    tokenizer_from: Literal["source", "reference"] | None
    allow_missing: bool
    allow_unexpected: bool
    card: Literal["new", "base", "none"]
    plot: PathLike | None
    heatmap: bool


@public
def hf_to_custom(
    *,
    hf_path: PathLike,
    custom_path: PathLike,
    save_path: PathLike | None = None,
    **options: Unpack[ConversionOptions],
) -> Report:
    """Convert HF weights (`InternVLForConditionalGeneration`) to the custom layout.

    Config, remote code and tokenizer come from `custom_path`, which may have no weights; if it has
    some, the report's `l2` is the distance from them. Further keywords are those of
    `streamshard.ConversionOptions`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    return _convert(_Asked("hf2custom", hf_path, custom_path, save_path, "custom"), options)


@public
def custom_to_hf(
    *,
    custom_path: PathLike,
    hf_path: PathLike,
    save_path: PathLike | None = None,
    **options: Unpack[ConversionOptions],
) -> Report:
    """Convert custom weights (`InternVLChatModel`) to the HF layout, in the *flat* spelling.

    The inverse of `hf_to_custom`, with the same keywords; config, tokenizer and processor come
    from `hf_path`.
    """
    return _convert(_Asked("custom2hf", custom_path, hf_path, save_path, "hf"), options)


@frozen
class _Asked:
    """What to convert: a source, beside which reference, where to, and to which layout."""

    command: str
    source: PathLike
    reference: PathLike
    output: PathLike | None
    layout: Layout


def _convert(asked: _Asked, options: ConversionOptions) -> Report:
    chosen = Options.of(options)
    allowed = Differences(
        tokenizer_from=options.get("tokenizer_from"),
        allow_missing=options.get("allow_missing", False),
        allow_unexpected=options.get("allow_unexpected", False),
    )
    card = options.get("card", "new")
    check_card(card)
    drawing = Drawing(options.get("plot"), heatmap=options.get("heatmap", False))
    # Planned in a function of its own: of 40,000 tensors each mapping that is left behind counts.
    return drawing.run(lambda: _conversion(asked, allowed, card, chosen), chosen)


def _conversion(asked: _Asked, allowed: Differences, card: str, chosen: Options) -> Job:
    started = time.perf_counter()
    source = Model(with_bare_names(open_checkpoint(asked.source)))
    note(*source.checkpoint.warnings)
    check_base(source.tensors, source.config, source.where, goal="converted")
    reference = Model(open_checkpoint(asked.reference, needs_weights=False))
    inputs = [source.path, reference.path]
    output = check_places(asked.output, inputs, overwrite=chosen.may_exist)
    converted = carry_over(source.tensors, source, reference, asked.layout, allowed)
    files = converted.files(chosen.dtype)
    note_left_behind(files, inputs)
    layout = layout_of(converted.tensors)
    dtype = chosen.dtype
    carded = with_card(
        card,
        files,
        lambda: conversion_card(source, reference.path, files, layout=layout, dtype=dtype),
    )
    return Job(
        command=asked.command,
        output=output,
        started=started,
        tensors=converted.tensors,
        layout=layout,
        shard_of=shard_names(converted.tensors, source.checkpoint),
        metadata={},
        files=carded,
        l2_from=None if converted.reference is None else str(reference.path),
        reference=converted.reference,
        facts={
            "source": str(source.path),
            "missing": converted.missing,
            "unexpected": converted.unexpected,
        },
        choices={**asdict(allowed), "card": card},
    )
