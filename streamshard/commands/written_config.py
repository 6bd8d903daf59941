"""A config as it is written into an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamshard.checkpoint.json_files import json_pieces
from streamshard.internvl.config_edits import with_dtype
from streamshard.tensors.dtypes import DTYPES, TORCH_DTYPES

__all__ = ["config_bytes"]


def config_bytes(config: Mapping[str, Any], dtype: str) -> bytes:
    """The content of a config file beside tensors that are written as `--dtype` says."""
    if dtype in DTYPES:  # anything else is refused with the tensors
        config = with_dtype(config, TORCH_DTYPES[DTYPES[dtype]])
    return b"".join(json_pieces(config))
