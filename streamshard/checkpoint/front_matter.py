"""Front matter: the YAML between two lines `---` at the top of a model card, as hubs read it.

A card may come from anywhere. Only its plain texts and lists of these are taken, few and short ones; no
type that YAML knows is made of them, so that the language `no` stays a text and a date is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from streamshard.disk.files import read_bytes
from streamshard.errors import InputError, printable

__all__ = ["FrontMatter", "front_matter_bytes", "read_front_matter"]

FrontMatter: TypeAlias = dict[str, str | list[str]]

MAX_CARD_BYTES = 5_000_000
MAX_FRONT_MATTER_CHARACTERS = 64_000
MAX_TEXT_CHARACTERS = 300
MAX_LIST_ITEMS = 100

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_NOTHING = {"", "~", "null", "Null", "NULL"}


def read_front_matter(file: Path) -> FrontMatter:
    """The texts and lists of texts at the top of a card; nothing if it has no front matter.

    Raises `InputError` if that is no YAML, refers to parts of itself, or is very large.
    """
    try:
        text = read_bytes(file, MAX_CARD_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError.at(file, f"is not UTF-8 (byte {error.start:,}).") from error
    block = _BLOCK.match(text)
    if block is None:
        return {}
    if len(block[1]) > MAX_FRONT_MATTER_CHARACTERS:
        raise InputError.at(
            file,
            f"its front matter has {len(block[1]):,} characters; "
            f"{MAX_FRONT_MATTER_CHARACTERS:,} is the limit here.",
        )
    content = _parsed(block[1], file)
    if not isinstance(content, dict):
        raise InputError.at(file, "its front matter is no mapping of names to values.")
    found: FrontMatter = {}
    for key, value in content.items():
        taken = _trimmed(value)
        if isinstance(taken, list):
            taken = [one for one in map(_trimmed, taken) if _is_text(one)][:MAX_LIST_ITEMS]
        elif not _is_text(taken):
            continue
        if _is_text(key) and taken:
            found[key] = taken
    return found


def _parsed(text: str, file: Path) -> Any:
    """Texts, lists and mappings: the loader makes nothing else of what is there."""
    import yaml

    loader = yaml.BaseLoader
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise InputError.at(file, "its front matter refers to parts of itself (*name).")
        return yaml.load(text, loader)  # noqa: S506 - which makes no objects
    except RecursionError as error:
        raise InputError.at(file, "its front matter is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        line = printable(str(error).partition("\n")[0])
        raise InputError.at(file, f"its front matter is not valid YAML: {line}.") from error


def _trimmed(value: Any) -> Any:
    """Texts without the line's end that those of several lines have (`license: >`)."""
    return value.strip() if isinstance(value, str) else value


def _is_text(value: Any) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= MAX_TEXT_CHARACTERS
        and value.isprintable()
        and value not in _NOTHING
    )


def front_matter_bytes(values: Mapping[str, str | Sequence[str]]) -> bytes:
    """Front matter with these values, in this order; what YAML would take for no text is quoted."""
    import yaml

    plain = {key: v if isinstance(v, str) else [*v] for key, v in values.items()}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---\n".encode()
