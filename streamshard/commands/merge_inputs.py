"""What `merge_lora` is given: a base and adapters, opened; and which of its options go together."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import cast

from streamshard.checkpoint.adapter_folder import AdapterFolder, open_adapter
from streamshard.checkpoint.file_names import ADAPTER_CONFIG_NAME
from streamshard.checkpoint.folder import open_checkpoint
from streamshard.checkpoint.no_adapter import is_adapter_folder, is_training_checkpoint
from streamshard.commands.bare_names import with_bare_names
from streamshard.commands.identify import Model
from streamshard.commands.training_checkpoint import open_wrapped
from streamshard.disk.paths import PathLike
from streamshard.errors import UsageError, argument, printable
from streamshard.internvl.families import LAYOUTS
from streamshard.lora.adapter import Adapter
from streamshard.lora.base_checks import check_base
from streamshard.lora.experts import EXPERT_ORDERS
from streamshard.lora.settings import read_settings
from streamshard.notes import note
from streamshard.values import frozen

__all__ = ["Asked", "Inputs", "open_inputs"]


@frozen(kw_only=True)
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
    allow_missing: bool
    allow_unexpected: bool


@frozen
class Inputs:
    """A base, the adapters to fold into it, and the folders they are from.

    There are as many folders as adapters, or none: a training checkpoint has its pairs inside.
    """

    base: Model
    adapters: Sequence[Adapter]
    folders: Sequence[AdapterFolder]
    missing: Sequence[str] = ()
    """What the base's config describes and the base does not have."""


def open_inputs(asked: Asked) -> Inputs:
    """Open base and adapters; raises `UsageError` for options that do not go together."""
    if asked.layout not in ("keep", *LAYOUTS):
        raise UsageError(f"--layout is {asked.layout!r}; keep, custom or hf can be chosen.")
    order = asked.expert_order
    if order not in EXPERT_ORDERS:
        raise UsageError(f"--expert-order is {order!r}; {' or '.join(EXPERT_ORDERS)} it is.")
    inputs = _training_checkpoint(asked) if asked.checkpoint is not None else _folders(asked)
    check_base(inputs.base.tensors, inputs.base.config, inputs.base.where)
    inputs.base.check()
    missing = inputs.base.check_whole(allow_missing=asked.allow_missing)
    return dataclasses.replace(inputs, missing=missing)


def _training_checkpoint(asked: Asked) -> Inputs:
    if asked.base is not None or asked.adapter is not None or asked.weight:
        too = {"--adapter": asked.adapter, "--base": asked.base, "--weight": asked.weight or None}
        given = " and ".join(option for option, value in too.items() if value is not None)
        path = printable(str(asked.checkpoint))
        if asked.adapter is not None and is_adapter_folder(cast("PathLike", asked.checkpoint)):
            raise UsageError(f"{path} is an adapter, too: write --adapter before each of them.")
        raise UsageError(
            f"{path} stands where a training checkpoint does, which has its base and its pairs inside: "
            f"{given} cannot be given with one. Leave that out, or {path}; a merge of adapters is "
            "`merge-lora --adapter ADAPTER --base MODEL`."
        )
    base, adapters = open_wrapped(
        cast("PathLike", asked.checkpoint),
        alpha=asked.alpha,
        adapter_name=asked.adapter_name,
        reference=asked.reference,
        layout=asked.layout,
    )
    return Inputs(Model(base), adapters, [])


def _folders(asked: Asked) -> Inputs:
    if asked.base is None or asked.adapter is None:
        raise _incomplete(asked)
    if asked.alpha is not None:
        raise UsageError("--alpha is for training checkpoints; an adapter's config has its own.")
    too = {"--reference": asked.reference, "--tokenizer-from": asked.tokenizer_from}
    if asked.layout == "keep" and any(value is not None for value in too.values()):
        given = " and ".join(option for option, value in too.items() if value is not None)
        raise UsageError(
            f"{given} would change nothing here: that belongs to --layout custom or hf. Give --layout "
            "too, or leave it out."
        )
    base = with_bare_names(open_checkpoint(asked.base))
    folders = _open_adapters(asked.adapter)
    note(*base.warnings, *(warning for folder in folders for warning in folder.warnings))
    return Inputs(Model(base), _adapters(folders, asked), folders)


def _incomplete(asked: Asked) -> UsageError:
    """The error of a merge that was given less than it needs, by what that is."""
    given = [asked.base] if asked.adapter is None else _paths(asked.adapter)
    only = given[0] if given else None
    if only is None:
        return UsageError(
            "nothing to merge: give an adapter and the model it was trained on (`merge-lora --adapter "
            "ADAPTER --base MODEL`), or a training checkpoint of InternVL, which has both inside "
            "(`merge-lora CHECKPOINT`)."
        )
    if is_training_checkpoint(only):
        return UsageError(
            f"{printable(str(only))} is a LoRA-wrapped training checkpoint, which has its base and its "
            f"pairs inside: `merge-lora {argument(only)}`."
        )
    if asked.adapter is None:
        return UsageError(
            "--adapter is missing: the folder that PEFT's save_pretrained wrote, to be folded into the "
            "base."
        )
    return UsageError(
        "--base is missing: the model that the adapter was trained on, a folder or a weight file."
    )


def _open_adapters(adapter: PathLike | Sequence[PathLike]) -> list[AdapterFolder]:
    paths = _paths(adapter)
    if not paths:
        raise UsageError("no adapter given: pass --adapter.")
    return [open_adapter(path) for path in paths]


def _paths(adapter: PathLike | Sequence[PathLike]) -> list[PathLike]:
    """One path, or several."""
    one = isinstance(adapter, (str, bytes, os.PathLike)) or not isinstance(adapter, Iterable)
    return [cast("PathLike", adapter)] if one else list(cast("Iterable[PathLike]", adapter))


def _adapters(folders: Sequence[AdapterFolder], asked: Asked) -> list[Adapter]:
    weights = [1.0] * len(folders) if not asked.weight else list(asked.weight)
    if len(weights) != len(folders):
        raise UsageError(
            f"{len(folders)} --adapter but {len(weights)} --weight: give one for each, in the same "
            "order, or none at all."
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
            {printable(str(beside.file)): beside.tensors for beside in folder.beside},
        )
        for folder, factor in zip(folders, weights, strict=True)
    ]
