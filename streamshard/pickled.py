"""Adapters saved as `.bin`: the only place on the way to a merge that imports torch."""

from __future__ import annotations

from pathlib import Path

from streamshard.errors import InputError, printable
from streamshard.tensors import Array, Lazy

__all__ = ["read_pickled"]


def read_pickled(file: Path) -> dict[str, Lazy]:
    """The tensors of a torch pickle, loaded with `weights_only=True`.

    Raises `InputError` if it holds anything but a flat mapping of names to tensors.
    """
    import torch

    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        # What the unpickler lets through may still be no plain array: sparse, or of a stride of 0.
        for tensor in content.values() if isinstance(content, dict) else ():
            if isinstance(tensor, torch.Tensor) and (
                tensor.layout != torch.strided
                or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
            ):
                raise ValueError("a tensor is no plain array")  # noqa: TRY301
    except Exception as error:  # torch raises whatever its unpickler meets
        raise InputError(
            f"{printable(str(file))}: cannot be loaded as plain tensors: {printable(str(error))} "
            "Save the adapter as safetensors and try again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{printable(str(file))}: is not a mapping of names to tensors.")
    tensors: dict[str, Lazy] = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{printable(str(file))}: '{printable(str(name))}' is no named tensor."
            )
        if tensor.dtype not in names:
            raise InputError(
                f"{printable(str(file))}: '{printable(name)}' is {tensor.dtype}; "
                "only bfloat16, float16 and float32 adapters can be merged."
            )
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        tensors[name] = Array(flat, tuple(tensor.shape), names[tensor.dtype])
    return tensors
