"""Pointers of git LFS: small texts that stand where a large file was not fetched."""

from __future__ import annotations

from pathlib import Path

from streamshard.errors import InputError

__all__ = ["MAX_POINTER_NBYTES", "check_pointer"]


MAX_POINTER_NBYTES = 1024  # the limit of the format; they have some 130


def check_pointer(file: Path, beginning: bytes) -> None:
    """Raise `InputError` if the file, which begins so, is only a pointer to the one that is meant."""
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        raise InputError.at(
            file,
            "is a pointer of git LFS, and the file itself was not fetched. Run `git lfs pull` in its "
            "folder (git lfs install, once), or download the model with `hf download`.",
        )
