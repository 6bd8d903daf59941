"""What `merge_lora` is given: a base and adapters, opened; and which of its options go together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from streamshard.checkpoint.adapter_folder import AdapterFolder, open_adapter
from streamshard.checkpoint.file_names import ADAPTER_CONFIG_NAME
from streamshard.checkpoint.folder import open_checkpoint
from streamshard.commands.identify import Model
from streamshard.commands.training_checkpoint import open_wrapped
from streamshard.disk.paths import PathLike
from streamshard.errors import UsageError, printable
from streamshard.internvl.families import LAYOUTS
from streamshard.lora.adapter import Adapter
from streamshard.lora.base_checks import check_base
from streamshard.lora.experts import EXPERT_ORDERS
from streamshard.lora.settings import read_settings

__all__ = ["Asked", "Inputs", "open_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `merge_lora` was asked for, in its own words."""

    base: PathLike | None
    adapter: PathLike | Sequence[PathLike] | None
    checkpoint: PathLike | None
    output: PathLike | None
    weight: Sequence[float] | None
    layout: str
    reference: PathLike | None
    tokenizer_from: str | None
    alpha: float | None
    adapter_name: str | None
    base_is_residual: bool
    expert_order: str
    allow_merged_base: bool


@dataclass(frozen=True, slots=True)
class Inputs:
    """A base, the adapters to fold into it, and the folders they are from.

    There are as many folders as adapters, or none: a training checkpoint has its pairs inside.
    """

    base: Model
    adapters: Sequence[Adapter]
    folders: Sequence[AdapterFolder]


def open_inputs(asked: Asked) -> Inputs:
    """Open base and adapters; raises `UsageError` for options that do not go together."""
    if asked.layout not in ("keep", *LAYOUTS):
        raise UsageError(f"--layout is {asked.layout!r}; keep, custom or hf can be chosen.")
    order = asked.expert_order
    if order not in EXPERT_ORDERS:
        raise UsageError(f"--expert-order is {order!r}; {' or '.join(EXPERT_ORDERS)} it is.")
    inputs = _training_checkpoint(asked) if asked.checkpoint is not None else _folders(asked)
    check_base(inputs.base.tensors, inputs.base.config)
    inputs.base.check()
    return inputs


def _training_checkpoint(asked: Asked) -> Inputs:
    if asked.base is not None or asked.adapter is not None or asked.weight:
        raise UsageError(
            "a training checkpoint has its base and its pairs inside: give either CHECKPOINT, or "
            "--adapter and --base."
        )
    base, adapters = open_wrapped(
        cast("PathLike", asked.checkpoint), alpha=asked.alpha, adapter_name=asked.adapter_name
    )
    return Inputs(Model(base), adapters, [])


def _folders(asked: Asked) -> Inputs:
    if asked.base is None or asked.adapter is None:
        raise UsageError("give --adapter and --base, or a LoRA-wrapped training CHECKPOINT.")
    if asked.alpha is not None:
        raise UsageError("--alpha is for training checkpoints; an adapter's config has its own.")
    if asked.layout == "keep" and (asked.reference, asked.tokenizer_from) != (None, None):
        raise UsageError(
            "--reference and --tokenizer-from would change nothing here: they belong to --layout "
            "custom or hf. Give that too, or leave them out."
        )
    base = open_checkpoint(asked.base)
    folders = _open_adapters(asked.adapter)
    return Inputs(Model(base), _adapters(folders, asked), folders)


def _open_adapters(adapter: PathLike | Sequence[PathLike]) -> list[AdapterFolder]:
    one = isinstance(adapter, (str, bytes, os.PathLike)) or not isinstance(adapter, Iterable)
    paths = [cast("PathLike", adapter)] if one else list(cast("Iterable[PathLike]", adapter))
    if not paths:
        raise UsageError("no adapter given: pass --adapter.")
    return [open_adapter(path) for path in paths]


def _adapters(folders: Sequence[AdapterFolder], asked: Asked) -> list[Adapter]:
    weights = [1.0] * len(folders) if not asked.weight else list(asked.weight)
    if len(weights) != len(folders):
        raise UsageError(
            f"{len(folders)} adapters but {len(weights)} weights: give --weight once per --adapter, "
            "or not at all."
        )
    if not all(math.isfinite(value) for value in weights):
        raise UsageError("--weight must be a finite number.")
    return [
        Adapter(
            printable(str(folder.file)),
            read_settings(
                folder.config,
                printable(str(folder.path / ADAPTER_CONFIG_NAME)),
                base_is_residual=asked.base_is_residual,
            ),
            folder.tensors,
            factor,
            asked.adapter_name,
            asked.expert_order,
        )
        for folder, factor in zip(folders, weights, strict=True)
    ]
