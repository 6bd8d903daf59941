"""`hf_to_custom` and `custom_to_hf`: the conversions of the Python API.

They return the report as a dict; its keys are those of the command line's `--json`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.checkpoint.folder import Checkpoint, open_checkpoint
from streamshard.checkpoint.shards import shard_names
from streamshard.commands.carry_over import Target, carry_over
from streamshard.commands.written_config import config_bytes
from streamshard.disk.inputs import watched
from streamshard.disk.paths import PathLike
from streamshard.engine.job import Job, Options
from streamshard.engine.output_path import check_places
from streamshard.engine.report import Report
from streamshard.engine.run import run
from streamshard.internvl.detection import layout_of
from streamshard.limits import told
from streamshard.lora.base_checks import check_base

__all__ = ["conversion_job", "custom_to_hf", "hf_to_custom"]


@told
@watched
def hf_to_custom(
    *, hf_path: PathLike, custom_path: PathLike, save_path: PathLike, **options: Any
) -> Report:
    """Convert HF weights (`InternVLForConditionalGeneration`) to the custom layout.

    Config, remote code and tokenizer come from `custom_path`, which may have no weights; if it has
    some, the report's `l2` is the distance from them. `tokenizer_from` ("source" or "reference")
    says whose tokenizer is meant where the vocabularies differ; `allow_missing` and `allow_unexpected`
    turn tensors that only one side has from an error into an entry of the report. Further
    keywords are those of `streamshard.engine.job.Options`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    return _convert("hf2custom", hf_path, custom_path, save_path, "custom", **options)


@told
@watched
def custom_to_hf(
    *, custom_path: PathLike, hf_path: PathLike, save_path: PathLike, **options: Any
) -> Report:
    """Convert custom weights (`InternVLChatModel`) to the HF layout, in the *flat* spelling.

    The inverse of `hf_to_custom`, with the same keywords; config, tokenizer and processor come
    from `hf_path`.
    """
    return _convert("custom2hf", custom_path, hf_path, save_path, "hf", **options)


def _convert(
    command: str,
    source_path: PathLike,
    reference_path: PathLike,
    save_path: PathLike,
    layout: str,
    *,
    tokenizer_from: str | None = None,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    **options: Any,
) -> Report:
    chosen = Options(**options)
    # Planned in a function of its own: of 40,000 tensors each mapping that is left behind counts.
    return run(
        _conversion(
            command,
            source_path,
            reference_path,
            save_path,
            layout,
            chosen,
            tokenizer_from=tokenizer_from,
            allow_missing=allow_missing,
            allow_unexpected=allow_unexpected,
        ),
        chosen,
    )


def _conversion(
    command: str,
    source_path: PathLike,
    reference_path: PathLike,
    save_path: PathLike,
    layout: str,
    chosen: Options,
    *,
    tokenizer_from: str | None,
    allow_missing: bool,
    allow_unexpected: bool,
) -> Job:
    started = time.perf_counter()
    source = open_checkpoint(source_path)
    check_base(source.tensors, source.config)
    reference = open_checkpoint(reference_path, needs_weights=False)
    inputs = [source.path, reference.path]
    target = check_places(save_path, inputs, overwrite=chosen.overwrite)
    converted = carry_over(
        source.tensors,
        source,
        reference,
        layout,
        tokenizer_from=tokenizer_from,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    facts = {
        "source": str(source.path),
        "missing": converted.missing,
        "unexpected": converted.unexpected,
        "warnings": converted.warnings,
    }
    compared = None if converted.reference is None else str(reference.path)
    job = conversion_job(command, target, started, source, converted, compared, facts, chosen.dtype)
    choices = {
        "tokenizer_from": tokenizer_from,
        "allow_missing": allow_missing,
        "allow_unexpected": allow_unexpected,
    }
    return dataclasses.replace(job, reference=converted.reference, choices=choices)


def conversion_job(
    command: str,
    target: Path,
    started: float,
    source: Checkpoint,
    converted: Target,
    l2_from: str | None,
    facts: Mapping[str, Any],
    dtype: str,
) -> Job:
    """What to write of a checkpoint that was carried to another layout."""
    config = converted.config if dtype == "keep" else converted.config or converted.base_config
    files: dict[str, Path | bytes] = dict(converted.side_files)
    if config is not None:
        files[MODEL_CONFIG_NAME] = config_bytes(config, dtype)
    return Job(
        command=command,
        output=target,
        started=started,
        tensors=converted.tensors,
        layout=layout_of(converted.tensors),
        shard_of=shard_names(converted.tensors, source),
        metadata={},
        files=files,
        l2_from=l2_from,
        facts=facts,
    )
