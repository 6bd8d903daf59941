"""Adapters saved as `.bin`: the only place on the way to a merge that imports torch."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

from streamshard.checkpoint.header import MAX_NAME_BYTES
from streamshard.disk.files import open_source
from streamshard.disk.sources import Source
from streamshard.errors import InputError, StreamshardError, printable
from streamshard.extras import needed_for
from streamshard.limits import Need, check_room
from streamshard.tensors.dtypes import TORCH_DTYPES
from streamshard.tensors.lazy import Array, Lazy

__all__ = ["read_pickled"]


_TORCH = Need(145_000_000, 540_000_000, 215_000_000)
"""Measured: importing torch without CUDA and loading a small file. It may crash with less."""


def read_pickled(file: Path) -> dict[str, Lazy]:
    """The tensors of a torch pickle, loaded with `weights_only=True`.

    Raises `InputError` if it holds anything but a flat mapping of names to tensors, or if it would
    take more memory than the file has bytes.
    """
    try:
        with open_source(file) as opened:
            nbytes = opened.nbytes
            _check_size(opened)
            content = _load(opened)
    except (
        StreamshardError,
        MemoryError,
        ImportError,
    ):  # the latter two say nothing about the file
        raise
    except Exception as error:  # torch raises whatever its unpickler meets
        raise InputError.at(
            file,
            f"cannot be loaded as plain tensors: {printable(str(error))} "
            "Save the adapter as safetensors and try again.",
        ) from error
    if not isinstance(content, dict):
        raise InputError.at(file, "is not a mapping of names to tensors.")
    tensors: dict[str, Lazy] = {}
    copied = 0
    for name, tensor in content.items():
        array = _array(file, name, tensor)
        if not tensor.is_contiguous():  # the copies of views add up: each may be of the same bytes
            copied += array.nbytes
            if copied > nbytes:
                raise InputError.at(
                    file,
                    "its tensors are views of the same bytes and would take far more memory "
                    "than the file. Save the adapter as safetensors and try again.",
                )
        tensors[name] = array
    return tensors


def _check_size(file: Source) -> None:
    """Raise `ValueError` unless the file is as `torch.save` writes it: a zip, nothing compressed."""
    with zipfile.ZipFile(file.stream()) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its content is compressed, which torch does not do.")
    if sum(entry.file_size for entry in entries) > file.nbytes:
        raise ValueError("it claims more content than it has bytes.")


def _load(file: Source) -> Any:
    if "torch" not in sys.modules:
        check_room("torch, which reads this .bin; safetensors need none of it", _TORCH)
    with needed_for("reading a .bin file"):
        import torch

    return torch.load(file.stream(), map_location="cpu", weights_only=True)


def _array(file: Path, name: object, tensor: Any) -> Array:
    import torch

    names = {getattr(torch, known): name for name, known in TORCH_DTYPES.items()}
    if (
        not isinstance(name, str)
        or len(name) > MAX_NAME_BYTES
        or not isinstance(tensor, torch.Tensor)
    ):
        raise InputError.at(file, f"'{printable(str(name))}' is no named tensor.")
    if tensor.dtype not in names:
        raise InputError.at(
            file,
            f"'{printable(name)}' is {tensor.dtype}; "
            "only bfloat16, float16 and float32 adapters can be merged.",
        )
    # What the unpickler lets through may still be no plain array: sparse, nested, without data, or
    # of a stride of 0, which needs more memory than there are bytes.
    plain = (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_nested or tensor.is_neg() or tensor.is_quantized)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
    if not plain:
        raise InputError.at(
            file,
            f"'{printable(name)}' is no plain tensor. "
            "Save the adapter as safetensors and try again.",
        )
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Array(flat, tuple(tensor.shape), names[tensor.dtype])
