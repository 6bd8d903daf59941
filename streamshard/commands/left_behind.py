"""What an output lacks that loaders will look for: code that its configs name, weights of sub-folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import (
    MODEL_CONFIG_NAME,
    NOT_CARRIED,
    NOT_ENTERED,
    WEIGHTS,
)
from streamshard.checkpoint.json_files import MAX_JSON_BYTES, json_object
from streamshard.checkpoint.tokenizer import SETTINGS, Content, Tokenizer, modules_of
from streamshard.commands.identify import dimensions
from streamshard.disk.existence import is_folder, walked
from streamshard.disk.files import read_bytes
from streamshard.disk.system import reading
from streamshard.errors import InputError, listed, printable
from streamshard.notes import note

__all__ = ["note_left_behind"]

# As transformers looks for them: it fetches what these name, also where a `try` is around them.
_RELATIVE = re.compile(rb"^\s*from\s+\.(\w+)\s+import\b|^\s*import\s+\.(\w+)\s*$", re.MULTILINE)
_CONFIGS = re.compile(r"(?:.*_)?config\.json")


def note_left_behind(
    files: Mapping[str, Content],
    folders: Iterable[Path],
    remedy: str = "Copy such files from the original model",
) -> None:
    """Note what is named in the `files` of an output and not among them, and weights in sub-folders.

    What loaders need of a tokenizer counts as named by the config of an InternVL. `folders` are those
    that the files or the tensors are from; `remedy` says where what lacks can be taken from.
    """
    missing: dict[str, str] = {}
    for name, content in files.items():
        if "/" in name:
            continue
        try:
            for module in _named(name, content):
                if module not in files:
                    missing.setdefault(module, name)
        except InputError:  # whoever needs it says what is wrong
            continue
    if missing:
        by = sorted(set(missing.values()))
        note(
            f"the output lacks {listed(missing)}, to which {listed(by)} refer{'s' * (len(by) == 1)}: it "
            f"cannot be loaded with trust_remote_code. {remedy}"
        )
    lacking = _of_tokenizer(files)
    if lacking:
        note(f"the output lacks {lacking}, so that no tokenizer can be loaded from it. {remedy}")
    for folder in dict.fromkeys(folders):
        weights = list(_in_subfolders(folder))
        if weights:
            note(
                f"{printable(str(folder))}: {listed(weights)}: weights in sub-folders are not carried, "
                "though other files beside them may be. Copy them into the output if loaders need them"
            )


def _of_tokenizer(files: Mapping[str, Content]) -> str:
    """What the output of an InternVL lacks of a tokenizer; empty if that is nothing."""
    config = files.get(MODEL_CONFIG_NAME)
    if config is None:
        return ""
    text = config if isinstance(config, bytes) else read_bytes(config, MAX_JSON_BYTES)
    try:
        if dimensions(json_object(text, Path(MODEL_CONFIG_NAME))) is None:
            return ""
    except InputError:  # whoever needs it says what is wrong
        return ""
    own = Tokenizer.of(MODEL_CONFIG_NAME, files)
    if not own.is_whole:
        return "a vocabulary (tokenizer.json, or vocab.json and merges.txt, or tokenizer.model)"
    lacking = {SETTINGS: SETTINGS not in files, "merges.txt": own.lacks_merges}
    return listed([name for name, lacks in lacking.items() if lacks])


def _named(name: str, content: Content) -> Iterator[str]:
    """The files of code that a file names."""
    if name.endswith(".py"):
        text = content if isinstance(content, bytes) else read_bytes(content, MAX_JSON_BYTES)
        for found in _RELATIVE.finditer(text):
            yield f"{(found[1] or found[2]).decode()}.py"
    elif _CONFIGS.fullmatch(name):
        text = content if isinstance(content, bytes) else read_bytes(content, MAX_JSON_BYTES)
        yield from _modules(json_object(text, Path(name)))


def _modules(config: Mapping[str, Any]) -> Iterator[str]:
    """What a config names at its top, or for a part of the model."""
    yield from modules_of(config.get("auto_map"))
    for inner in config.values():
        if isinstance(inner, dict):
            yield from _modules(inner)


def _in_subfolders(folder: Path) -> Iterator[str]:
    with reading(folder):
        if not is_folder(folder):
            return
        for parent, folders, names in walked(folder, strict=False):
            folders[:] = sorted(name for name in folders if not NOT_ENTERED.fullmatch(name))
            for name in names if parent != folder else ():
                weights = WEIGHTS.fullmatch(name.lower()) and not name.endswith(".json")
                if weights and NOT_CARRIED.fullmatch(name):
                    yield (parent / name).relative_to(folder).as_posix()
