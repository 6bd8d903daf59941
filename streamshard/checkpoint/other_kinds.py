"""What a file is that is not of the kind which its name says, told by how it begins."""

from __future__ import annotations

import re
from pathlib import Path

from streamshard.checkpoint.lfs_pointers import check_pointer
from streamshard.errors import InputError

__all__ = ["check_beginning"]


_FETCH = "Fetch or copy the file again."
# A file of safetensors has the length of its header, of less than 100 MB, then JSON.
_SAFETENSORS = re.compile(rb".{4}\0{4}\{", re.DOTALL)
_OTHERS = (
    (
        re.compile(rb"PK\x03\x04"),
        "is a zip archive, as torch.save writes",
        "Rename it to end in .bin.",
    ),
    (_SAFETENSORS, "is a file of safetensors", "Rename it to end in .safetensors."),
    (re.compile(rb"\s*<(?:!doctype|html|\?xml)", re.IGNORECASE), "is a page of a website", _FETCH),
    (
        re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ|7z"),
        "is compressed",
        "Unpack it first.",
    ),
    (re.compile(rb"GGUF"), "is a GGUF file, of llama.cpp", "Give the model that it was made of."),
    (re.compile(rb"\x89HDF"), "is an HDF5 file", "Save it as safetensors."),
    (re.compile(rb"\0{64}"), "begins with zeros, as a download that was not finished", _FETCH),
)


def check_beginning(file: Path, beginning: bytes, own: bytes) -> None:
    """Raise `InputError` if a file with these first 64 bytes is of another kind, or a pointer to it.

    `own` is an example of what files of its name begin with.
    """
    check_pointer(file, beginning)
    for pattern, what, then in _OTHERS:
        if pattern.match(beginning) and not pattern.match(own):
            raise InputError.at(file, f"{what}, whatever its name says. {then}")
