"""Merge LoRA adapters into InternVL checkpoints and convert them, tensor by tensor.

Importing this package imports neither numpy nor torch; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamshard.version import __version__

__all__ = [
    "DTYPES",
    "AdapterError",
    "BusyError",
    "ChangedError",
    "ClusterError",
    "ConversionOptions",
    "HubError",
    "InputError",
    "NotFoundError",
    "OutOfMemoryError",
    "OutputError",
    "OutputOptions",
    "ReadError",
    "Report",
    "StreamshardError",
    "StreamshardWarning",
    "UnreadError",
    "UsageError",
    "VerificationError",
    "WriteError",
    "__version__",
    "compute_l2_distance",
    "convert_keys_back",
    "convert_keys_to_hf",
    "custom_to_hf",
    "diff",
    "environment",
    "errors",
    "extract_lora",
    "hf_to_custom",
    "inspect",
    "merge_lora",
    "plot",
    "verify",
    "wrap_backbone_lora",
    "wrap_llm_lora",
    "wrap_lora",
]

if TYPE_CHECKING:
    from streamshard import errors
    from streamshard.commands.convert import ConversionOptions, custom_to_hf, hf_to_custom
    from streamshard.commands.diff import diff
    from streamshard.commands.environment import environment
    from streamshard.commands.extract_lora import extract_lora
    from streamshard.commands.inspect import inspect
    from streamshard.commands.live_models import wrap_backbone_lora, wrap_llm_lora
    from streamshard.commands.merge_lora import merge_lora
    from streamshard.commands.plot import plot
    from streamshard.commands.state_dicts import (
        compute_l2_distance,
        convert_keys_back,
        convert_keys_to_hf,
    )
    from streamshard.commands.verify import verify
    from streamshard.commands.wrap_lora import wrap_lora
    from streamshard.engine.job import OutputOptions
    from streamshard.engine.report import Report
    from streamshard.errors import (
        AdapterError,
        BusyError,
        ChangedError,
        ClusterError,
        HubError,
        InputError,
        NotFoundError,
        OutOfMemoryError,
        OutputError,
        ReadError,
        StreamshardError,
        StreamshardWarning,
        UnreadError,
        UsageError,
        VerificationError,
        WriteError,
    )
    from streamshard.tensors.dtypes import DTYPES

_LIGHT = {"tensors.dtypes"}
"""What needs no numpy."""
_HOMES = {
    "DTYPES": "tensors.dtypes",
    "ConversionOptions": "commands.convert",
    "OutputOptions": "engine.job",
    "Report": "commands.public",  # which says how it is shown
    "compute_l2_distance": "commands.state_dicts",
    "convert_keys_back": "commands.state_dicts",
    "convert_keys_to_hf": "commands.state_dicts",
    "custom_to_hf": "commands.convert",
    "diff": "commands.diff",
    "environment": "commands.environment",
    "extract_lora": "commands.extract_lora",
    "hf_to_custom": "commands.convert",
    "inspect": "commands.inspect",
    "merge_lora": "commands.merge_lora",
    "plot": "commands.plot",
    "verify": "commands.verify",
    "wrap_backbone_lora": "commands.live_models",
    "wrap_llm_lora": "commands.live_models",
    "wrap_lora": "commands.wrap_lora",
}
_ERRORS = {one for one in __all__ if one.endswith(("Error", "Warning"))}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors" or name in _ERRORS:
        errors = import_module("streamshard.errors")
        return errors if name == "errors" else getattr(errors, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'streamshard' has no attribute {name!r}")
    from streamshard import errors, extras, limits, wording

    try:
        if _HOMES[name] not in _LIGHT:
            limits.import_numpy()
        return getattr(import_module(f"streamshard.{_HOMES[name]}"), name)
    except errors.StreamshardError as error:
        error.args = (wording.spoken(str(error), name),)
        raise
    except ImportError as error:
        missing = extras.explained(error)
        if missing is None:
            raise
        raise missing from error


def __dir__() -> list[str]:
    return sorted(__all__)
