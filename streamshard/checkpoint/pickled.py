"""Files of torch (`.bin`, `.pt`, `.pth`): names to tensors that lie in them as they are.

`torch.save` puts every tensor's bytes, as they are in memory, into an archive that is not compressed.
So they are read from their place like those of safetensors, a block at a time, and torch is not
needed; nothing that the file names is called or looked up (`pickle_program`).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from streamshard.checkpoint.header import MAX_NAME_BYTES, MAX_RANK
from streamshard.checkpoint.other_kinds import check_beginning
from streamshard.checkpoint.pickle_program import (
    Described,
    PickleError,
    Storage,
    Unknown,
    run_program,
)
from streamshard.checkpoint.zip_entries import Entries, NoArchiveError, read_entries
from streamshard.disk.files import open_source
from streamshard.disk.sources import Source
from streamshard.errors import InputError, printable
from streamshard.extras import install
from streamshard.tensors.dtypes import DTYPE_BITS
from streamshard.tensors.lazy import Array, Lazy, Stored
from streamshard.values import frozen

__all__ = ["look_into", "read_pickled", "rewritten"]


MAX_PROGRAM_NBYTES = 32_000_000  # 200 bytes a tensor
MAX_COPIED_NBYTES = 64_000_000

# The classes of storages, and the words of torch for dtypes, which newer files have in their place.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}


def read_pickled(file: Path, *, copies: bool = True) -> dict[str, Lazy]:
    """The tensors of a file that `torch.save` wrote of a flat mapping of names to tensors.

    Of tensors whose elements lie in another order (views) small copies are made, if `copies`. Raises
    `InputError` for anything else, for files of torch before 1.6, and for what is damaged.
    """
    with open_source(file) as opened:
        found = _mapping(file, opened)
        tensors: dict[str, Lazy] = {}
        room = min(opened.nbytes, MAX_COPIED_NBYTES) if copies else 0
        for name, value in found.content.items():
            if not isinstance(name, str) or len(name) > MAX_NAME_BYTES:
                raise InputError.at(file, f"{printable(repr(name))} is no name of a tensor.")
            if not isinstance(value, Described):
                raise _no_tensor(file, name, value)
            tensor = found.tensor(name, value, room)
            if isinstance(tensor, Array):
                room -= tensor.nbytes
            tensors[sys.intern(name)] = tensor
    return _in_order(tensors)


def look_into(file: Path) -> dict[str, Lazy]:
    """The named tensors in a file of torch, whatever else is in it; none of a trainer's state.

    If they are a mapping within mappings, as `{"state_dict": …}`, these. Raises `InputError` if the
    file cannot be read at all, or has tensors elsewhere, too: within objects or in several mappings.
    """
    with open_source(file) as opened:
        found = _mapping(file, opened)
        levels, aside = _levels(found.content)
        named = [
            {n: v for n, v in level.items() if isinstance(n, str) and isinstance(v, Described)}
            for level in levels
        ]
        named = [level for level in named if level]
        aside |= {id(value) for level in named for value in level.values()}
        more = sum(id(value) not in aside for value in found.made)
        if len(named) > 1 or more:
            where = f"in {len(named)} mappings" if len(named) > 1 else "within others or objects"
            raise InputError.at(
                file,
                f"has tensors {where}, so how they are called is not known. Save them as one flat "
                "mapping of names to tensors, best as safetensors.",
            )
        room = min(opened.nbytes, MAX_COPIED_NBYTES)
        return {n: found.tensor(n, v, room) for level in named for n, v in level.items()}


def _levels(content: dict[Any, Any]) -> tuple[list[dict[Any, Any]], set[int]]:
    """A mapping and those within it, but states of optimizers, and what is in those."""
    levels: list[dict[Any, Any]] = []
    aside: set[int] = set()
    seen = {id(content)}
    waiting: list[tuple[Any, bool]] = [(content, False)]
    while waiting:
        value, is_state = waiting.pop()
        if isinstance(value, dict):
            is_state = is_state or "param_groups" in value
            if not is_state:
                levels.append(value)
        elif not is_state:
            continue
        for inner in value.values() if isinstance(value, dict) else value:
            if is_state:
                aside.add(id(inner))
            if isinstance(inner, (dict, list, tuple)) and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((inner, is_state))
    return levels, aside


def rewritten(file: Path) -> str:
    """The command that writes a file of torch anew, in the form that is read here."""
    return (
        'python -c "import os, sys, torch; p = sys.argv[1]; torch.save({k: v.contiguous() for k, v in '
        "torch.load(p, map_location='cpu', weights_only=True).items()}, p + '.new'); "
        f"os.replace(p + '.new', p)\" {printable(str(file))}"
    )


@frozen
class _Mapping:
    """The mapping in a file, and the entries that its tensors lie in."""

    file: Path
    entries: Entries
    root: str
    content: dict[Any, Any]
    made: list[Described | Unknown]
    """All its tensors."""

    def tensor(self, name: str, described: Described, room: int) -> Lazy:
        """A tensor at its place; `room` is how many bytes may be copied of one that is a view."""
        storage, shape = described.storage, described.shape
        dtype = _dtype(described)
        entry = f"{self.root}data/{storage.key}"
        if dtype is None or len(shape) > MAX_RANK or len(described.stride) != len(shape):
            what = described.dtype or storage.kind
            raise InputError.at(
                self.file, f"'{printable(name)}' is of a kind that is not known here ({what})."
            )
        if entry not in self.entries:
            raise _damaged(self.file, f"it lacks the data of '{printable(name)}'")
        width, count = DTYPE_BITS[dtype] // 8, math.prod(shape)
        reach = sum((n - 1) * step for n, step in zip(shape, described.stride, strict=True))
        end = described.offset + (reach + 1 if count else 0)
        nbytes = self.entries.nbytes(entry)
        if storage.elements * _width(storage) != nbytes:
            raise _damaged(self.file, f"the data of '{printable(name)}' is of another size")
        if described.offset < 0 or end * width > nbytes or count * width > nbytes:
            raise InputError.at(
                self.file,
                f"'{printable(name)}' is no plain tensor: {count:,} elements of {dtype} do not lie in "
                f"the {nbytes:,} bytes that it has. {_again(self.file)}",
            )
        try:
            begin = self.entries.offset(entry) + described.offset * width
        except NoArchiveError as error:
            raise _damaged(self.file, str(error)) from error
        if _is_contiguous(shape, described.stride):
            return Stored(str(self.file), begin, shape, dtype, self.entries.file.nbytes)
        if max(count, reach + 1) * width > room:
            raise InputError.at(
                self.file,
                f"'{printable(name)}' is a view whose elements lie in another order, and too large to "
                f"be copied. {_again(self.file)}",
            )
        data = self.entries.file.read(begin, (reach + 1) * width)
        steps = tuple(step * width for step in described.stride)
        view = np.ndarray(shape, np.dtype((np.void, width)), data, strides=steps)
        flat = np.frombuffer(view.tobytes(), np.uint8)
        return Array(flat, shape, dtype)


def _mapping(file: Path, opened: Source) -> _Mapping:
    """The mapping that a file describes; nothing of the tensors is read."""
    beginning = opened.read(0, 64)
    check_beginning(file, beginning, b"PK\3\4")
    if beginning.startswith(b"\x80"):
        raise InputError.at(
            file,
            "is a pickle and no zip archive, as torch writes them since 1.6, so it cannot be read. "
            f"{_again(file)}",
        )
    if not beginning.startswith(b"PK"):
        kind = "no file of torch" if beginning else "empty"
        raise InputError.at(file, f"is {kind}. Fetch or copy it again.")
    try:
        entries = read_entries(opened)
        root = _root(entries)
        made: list[Described | Unknown] = []
        content = run_program(entries.read(f"{root}data.pkl", MAX_PROGRAM_NBYTES), made)
    except (NoArchiveError, PickleError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(content, dict):
        raise InputError.at(file, "is not a mapping of names to tensors.")
    return _Mapping(file, entries, root, content, made)


def _root(entries: Entries) -> str:
    """What the names of all entries begin with: the folder that the archive would be unpacked to."""
    roots = [name.removesuffix("data.pkl") for name in entries.names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise NoArchiveError("it has no data.pkl, or several")
    order = f"{roots[0]}byteorder"
    if order in entries and entries.read(order, 100) != b"little":
        raise NoArchiveError("it is of a machine with another order of bytes")
    return roots[0]


def _dtype(described: Described) -> str | None:
    module, _, word = described.storage.kind.rpartition(".")
    if module not in ("torch", "torch.storage", "torch.cuda"):
        return None
    if not described.dtype:
        return _STORAGES.get(word)
    return _DTYPES.get(described.dtype.removeprefix("torch."))


def _width(storage: Storage) -> int:
    """Bytes of what a storage counts: its elements, or bytes if it has no dtype."""
    return DTYPE_BITS[_STORAGES.get(storage.kind.rpartition(".")[2], "U8")] // 8


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True


def _in_order(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """The tensors as they lie in the file, so that it is read from the beginning to its end."""

    def place(item: tuple[str, Lazy]) -> int:
        return item[1].offset if isinstance(item[1], Stored) else -1

    return dict(sorted(tensors.items(), key=place))


def _no_tensor(file: Path, name: str, value: object) -> InputError:
    kind = value.name if isinstance(value, Unknown) else type(value).__name__
    return InputError.at(
        file,
        f"cannot be loaded as plain tensors: '{printable(name)}' is {printable(kind)}. Save the tensors "
        "alone, as a flat mapping of names to tensors, best as safetensors.",
    )


def _again(file: Path) -> str:
    return f"To convert it (with torch: {install('torch')}): {rewritten(file)}"


def _damaged(file: Path, problem: str) -> InputError:
    return InputError.at(
        file, f"cannot be loaded as plain tensors: {printable(problem)}. Copy or save it again."
    )
