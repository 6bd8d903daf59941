"""What a run is to write, told by content: whether a later run may continue an earlier one.

A fingerprint is what a plan knows: the options that bytes depend on, and a digest of the recipe, which
is the headers of all files and the expression of every tensor. Nothing is read for it. An identity
has beside that what is there when the plan is carried out, as plain JSON: the versions, and a digest
of each input. Paths do not count. Adapters and small files are read whole, and their times do not
count either; of the large shards of checkpoints it is the size, the header, blocks spread over the
data, and when the file was last changed, as nobody would wait for all of it to be read once more.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from streamshard.checkpoint.digests import Hash, file_digest, hash_file, new_digest
from streamshard.checkpoint.file_names import SUFFIX
from streamshard.checkpoint.header import data_start
from streamshard.disk.far import far_at
from streamshard.disk.files import open_source
from streamshard.disk.sources import Source
from streamshard.errors import printable
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.values import frozen
from streamshard.version import __version__

__all__ = ["Fingerprint", "Identity", "differences", "fingerprint", "identity_digest"]


Identity: TypeAlias = dict[str, Any]

SAMPLES = 16
SAMPLE_NBYTES = 64 * 1024


@frozen
class Fingerprint:
    """What must be the same for another run to continue this one, as far as a plan knows it."""

    command: str
    options: Mapping[str, Any]
    """Those that users know."""
    recipe: str
    inputs: tuple[tuple[str, bool], ...]
    """The files that tensors are read from, and whether all that is in them counts."""

    def identity(self, files: Mapping[str, Any]) -> Identity:
        """All that must be the same: for this every input is looked at.

        `files` are what lies beside the weights, by name: a file to copy, content, or a dataclass
        that makes it.
        """
        inputs = [_input(path, whole=whole) for path, whole in self.inputs]
        return {
            "streamshard": __version__,
            "command": self.command,
            "options": dict(self.options),
            "inputs": inputs,
            "files": {name: _content_digest(content) for name, content in sorted(files.items())},
            "recipe": self.recipe,
        }


def fingerprint(command: str, options: Mapping[str, Any], recipe: Iterable[Any]) -> Fingerprint:
    """The fingerprint of a plan whose `recipe` is made of tensors, strings, numbers and bytes."""
    walk = _Recipe()
    for part in recipe:
        walk.add(part)
    return Fingerprint(command, options, walk.digest.hexdigest(), tuple(walk.inputs.items()))


def differences(old: Identity, new: Identity) -> list[str]:
    """What is not the same in two identities, in words; nothing if they are of one run."""
    found = []
    if old.get("streamshard") != new["streamshard"]:
        found.append(f"it was version {old.get('streamshard')}, this is {new['streamshard']}")
    if old.get("command") != new["command"]:
        found.append(f"it was {old.get('command')}, this is {new['command']}")
    found += [
        f"--{name.replace('_', '-')} was {_shown(before)} and is {_shown(now)}"
        for name, before, now in _unequal(old.get("options"), new["options"])
    ]
    found += _changed_inputs(old.get("inputs") or [], new["inputs"])
    for name, before, now in _unequal(old.get("files"), new["files"]):
        how = "is new" if before is None else "is gone" if now is None else "has changed"
        found.append(f"the file {printable(name)} to be put beside the weights {how}")
    if not found and old.get("recipe") != new["recipe"]:
        found.append("other tensors are to be written, or from other sources")
    return found


def identity_digest(identity: Identity) -> str:
    """The digest of an identity: equal if there are no differences. Paths of inputs do not count."""
    inputs = [[content, times] for _, content, times in identity["inputs"]]
    digest = new_digest()
    digest.update(json.dumps({**identity, "inputs": inputs}, sort_keys=True).encode())
    return digest.hexdigest()


def _unequal(old: object, new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before = old if isinstance(old, dict) else {}
    for name in [*new, *(name for name in before if name not in new)]:
        if before.get(name) != new.get(name):
            yield name, before.get(name), new.get(name)


def _shown(value: object) -> str:
    return "not given" if value in (None, [], False) else printable(str(value))


def _changed_inputs(old: Any, new: Sequence[Sequence[Any]]) -> list[str]:
    if not _is_inputs(old):
        return ["it is not known what its inputs were"]
    before, now = ({path: digest for path, digest, _ in inputs} for inputs in (old, new))
    if [digest for _, digest, _ in old] == [digest for _, digest, _ in new]:
        return [
            f"the input {printable(path)} was copied or written to since, and is too large to be compared"
            for (_, _, time), (path, _, now_time) in zip(old, new, strict=True)
            if time != now_time
        ]
    found = []
    for path, digest in now.items():
        if path in before and before[path] != digest:
            found.append(f"the input {printable(path)} has changed")
        elif digest not in before.values():
            found.append(f"the input {printable(path)} is another one")
    found += [
        f"the input {printable(path)} is no longer one"
        for path, digest in before.items()
        if path not in now and digest not in now.values()
    ]
    return found or ["the inputs are in another order"]


def _is_inputs(value: Any) -> bool:
    """Whether something read from a journal is a list of inputs as `identity` makes it."""
    return isinstance(value, list) and all(
        isinstance(one, list) and len(one) == 3 and all(isinstance(part, str) for part in one[:2])
        for one in value
    )


_PLAIN = frozenset({int, float, str, bool, type(None)})


class _Recipe:
    """A digest of expressions, and the files that they read in the order of their first use."""

    def __init__(self) -> None:
        self.digest = new_digest()
        self.inputs: dict[str, bool] = {}
        """Path to whether its whole content counts."""
        self._numbers: dict[str, int] = {}
        self._fields: dict[type, tuple[str, ...]] = {}
        self._texts: list[str] = []

    def add(self, value: Any) -> None:
        """Add a tensor, or what stands beside tensors."""
        if isinstance(value, Lazy):
            for found in value.inputs():
                path = found.tensor.path
                self._numbers.setdefault(path, len(self._numbers))
                self.inputs[path] = self.inputs.get(path, False) or found.whole
        self._put(value)
        self._update()

    def _put(self, value: Any) -> None:
        kind = type(value)
        if kind is Stored:
            number = self._numbers[value.path]
            self._texts.append(f"Stored {number} {value.offset} {value.shape} {value.dtype}")
        elif kind in self._fields or dataclasses.is_dataclass(value):
            if kind not in self._fields:
                self._fields[kind] = tuple(field.name for field in dataclasses.fields(value))
            self._texts.append(kind.__name__)
            self._put_each(getattr(value, name) for name in self._fields[kind])
        elif isinstance(value, np.ndarray):
            self._texts.append(f"array {value.shape} {value.dtype}")
            self._update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        elif isinstance(value, (tuple, list)):
            self._texts.append(f"{len(value)} of")
            self._put_each(value)
        elif isinstance(value, bytes):
            self._texts.append(f"{len(value)} bytes")
            self._update(value)
        else:
            self._texts.append(repr(value))

    def _put_each(self, values: Iterable[Any]) -> None:
        for value in values:
            if type(value) in _PLAIN:  # nearly all are, and need no question more
                self._texts.append(repr(value))
            else:
                self._put(value)

    def _update(self, content: bytes | memoryview = b"") -> None:
        """Add lines of text that were not added yet, and bytes behind them."""
        lines = "".join(f"{text}\n" for text in self._texts)
        self._texts.clear()
        self.digest.update(lines.encode(errors="backslashreplace"))
        self.digest.update(content)


def _content_digest(content: Any) -> str:
    if isinstance(content, Path):
        return file_digest(content)
    if not isinstance(content, bytes):
        walk = _Recipe()
        walk.add(content)
        return walk.digest.hexdigest()
    digest = new_digest()
    digest.update(content)
    return digest.hexdigest()


def _input(path: str, *, whole: bool) -> list[Any]:
    """What an input is: its path, the digest that it is told by, and when it was changed."""
    elsewhere = far_at(path)
    if elsewhere is not None and not whole:
        # The same whether it is read where it is, or was here before.
        return [elsewhere.name, elsewhere.digest, None]
    name = path if elsewhere is None else elsewhere.name
    return [name, *((file_digest(Path(path)), None) if whole else _sampled(Path(path)))]


def _sampled(path: Path) -> tuple[str, list[int] | None]:
    """The digest of size, header and blocks spread over the data, and when the file was changed.

    If that is not more, the digest of everything and no time.
    """
    digest, changed = new_digest(), None
    with open_source(path) as file:
        # Of files of torch, whose description is at the end, places and shapes count in the recipe.
        header = data_start(file) if path.suffix == SUFFIX else 0
        if file.nbytes <= header + SAMPLES * SAMPLE_NBYTES:
            hash_file(path, digest)
        else:
            _add_samples(file, header, digest)
            changed = [file.stamp.mtime_ns, file.stamp.ctime_ns]
    return digest.hexdigest(), changed


def _add_samples(file: Source, header: int, digest: Hash) -> None:
    digest.update(f"{file.nbytes}\n".encode())
    digest.update(file.read(0, header))
    last = file.nbytes - SAMPLE_NBYTES
    for number in range(SAMPLES):
        offset = header + (last - header) * number // (SAMPLES - 1)
        digest.update(file.read(offset, SAMPLE_NBYTES))
