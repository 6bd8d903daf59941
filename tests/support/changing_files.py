"""Files that change while a command reads them, in every way and at chosen moments."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch

from streamshard.disk.system import system

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
READ_OF_A_BASE = [FIRST, SECOND, INDEX, "config.json"]
BESIDE = ["tokenizer.json", "generation_config.json", "modeling_x.py", "more/vocab.txt"]


# --- how a file changes ---------------------------------------------------------------------------


def other(file: Path) -> bytes:
    """Other content of the same kind and length."""
    data = file.read_bytes()
    if file.suffix == ".bin":
        tensors = torch.load(file, weights_only=True)
        copy = file.with_name("copy")
        torch.save({name: -tensor for name, tensor in tensors.items()}, copy)
        data = copy.read_bytes()
        copy.unlink()
        return data
    if file.suffix == ".safetensors":
        return data[:-1] + bytes([data[-1] ^ 0x80])  # the sign of the last element
    if data[-1:] != b"\n":
        return data[:-1] + bytes([data[-1] ^ 1])
    return data[:-1] + b" "


def in_place(file: Path) -> None:
    data = other(file)
    with file.open("r+b") as opened:
        opened.write(data)


def set_back(file: Path) -> None:
    times = file.stat()
    in_place(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(file: Path) -> None:
    times = file.stat()
    new = file.with_name("new")
    new.write_bytes(other(file))
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(file)


def replaced_by_the_same(file: Path) -> None:
    new = file.with_name("new")
    shutil.copy2(file, new)
    new.replace(file)


def linked(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    elsewhere.write_bytes(other(file))
    file.unlink()
    file.symlink_to(elsewhere)


def in_another_folder(file: Path) -> None:
    """All of the folder is replaced."""
    shutil.copytree(file.parent, file.parent.with_name("copied"))
    file.parent.rename(file.parent.with_name("was"))
    file.parent.with_name("copied").rename(file.parent)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "in place": in_place,
    "set back": set_back,
    "replaced": replaced,
    "by the same": replaced_by_the_same,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "grown": lambda file: os.truncate(file, file.stat().st_size + 1),
    "removed": lambda file: file.unlink(),
    "linked": linked,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "folder": in_another_folder,
}


# --- when it does ---------------------------------------------------------------------------------


def staged(root: Path, name: str) -> Callable[[], bool]:
    """Whether there is such a file where an output is built."""
    return lambda: any(root.glob(f"**/.*.partial/{name}"))


@contextlib.contextmanager
def at(moment: Callable[[], bool], change: Callable[[], Any]) -> Iterator[list[bool]]:
    """Do something once, at the first write when `moment` has come."""
    pwrite, lock, done = system.pwrite, threading.Lock(), []

    def call(descriptor: int, data: memoryview, offset: int) -> int:
        with lock:
            if not done and moment():
                done.append(True)
                change()
        return pwrite(descriptor, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "pwrite", call)
        yield done


MOMENTS = {
    "a shard": "*.part",
    "beside": "tokenizer.json",
    "the record": "streamshard.json",
}


def stopped(
    cli: Callable[..., Any], root: Path, command: list[str], file: Path, how: str, moment: str
) -> str:
    """Run a command while `file` changes: it must fail for that reason, and leave nothing."""
    after: list[dict[str, str]] = []
    folders = [root / name for name in os.listdir(root) if name != "out"]

    def change() -> None:
        CHANGES[how](file)
        after.extend(map(reference.digests, folders))

    with at(staged(root, MOMENTS[moment]), change) as done:
        outcome = cli(*command)
    assert done, "the moment did not come"
    assert outcome.code == 7, outcome.err
    assert outcome.out == ""
    assert str(file) in outcome.err or how == "folder"
    assert "while this run was reading it" in outcome.err
    assert "Traceback" not in outcome.err
    assert not list((root / "out").iterdir())
    assert list(map(reference.digests, folders)) == after
    return str(outcome.err)
