"""What a commit on the hub is made of, by the installed client; what it says of an upload is read here.

The client has no way to commit a file that was uploaded by an earlier process and is not on disk any
more, though the hub asks for nothing but its name, size and SHA-256. So some of its private fields are
set, here and nowhere else; `tests/checkpoint/test_hub_operations.py` holds that to what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamshard.checkpoint.sent_files import SentFile

__all__ = ["addition", "deletion", "is_left_out", "is_uploaded", "quiet", "uploaded"]


def addition(file: SentFile, path: Path) -> Any:
    """The operation that adds a file of this machine, whose SHA-256 is not taken once more."""
    from huggingface_hub import CommitOperationAdd

    found = CommitOperationAdd(file.name, str(path))
    found.upload_info.sha256 = bytes.fromhex(file.sha256)
    return found


def uploaded(file: SentFile) -> Any:
    """The operation that adds a file whose bytes the hub has already."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    found = CommitOperationAdd(file.name, b"")
    found.upload_info = UploadInfo(
        size=file.nbytes, sample=file.sample, sha256=bytes.fromhex(file.sha256)
    )
    found._upload_mode = "lfs"  # noqa: SLF001
    found._is_uploaded = True  # noqa: SLF001
    found._should_ignore = False  # noqa: SLF001
    return found


def deletion(name: str) -> Any:
    """The operation that removes a file."""
    from huggingface_hub import CommitOperationDelete

    return CommitOperationDelete(name, is_folder=False)


def is_uploaded(operation: Any) -> bool:
    """Whether an addition's bytes are on the hub after `preupload_lfs_files`."""
    return bool(operation._is_uploaded)  # noqa: SLF001


def is_left_out(operation: Any) -> bool:
    """Whether the repository's `.gitignore` has the hub leave a file out, which it does silently."""
    return bool(operation._should_ignore)  # noqa: SLF001


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of the client meanwhile: progress is told elsewhere."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
