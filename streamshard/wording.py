"""In whose words messages speak of options: those of the command line, or of Python.

Messages are written for the command line, as `--max-memory`, `--layout custom` or a whole command
in backquotes, and become those of whoever reads them at one place, where a public function ends
(`spoken`). A command gets the program's name before it, to be pasted as it is. From Python that is
`max_memory`, `layout="custom"`, `streamshard.merge_lora(adapter=A)`. An option that the running command
lacks is told with the command that has it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from contextvars import ContextVar

__all__ = ["COMMANDS", "FLAGS", "KEYWORDS", "command_line", "is_command_line", "spoken"]


_CACHE = ("cache_dir", "offline")
_READING = ("workers", "progress", "on_total", "on_step", *_CACHE)
_WRITING = (
    *("revision", *_CACHE, "stream", "push_to", "private", "commit_message"),
    *("max_shard_size", "dtype", "workers", "max_memory", "overwrite", "sha256", "io"),
    *("part", "scheduler", "dry_run"),
    *("progress", "on_plan", "on_step"),
)
_MERGE = ("adapter", "base", "checkpoint", "output", "weight", "layout", "reference", "alpha")
_MERGE_RARELY = ("adapter_name", "base_is_residual", "expert_order", "allow_merged_base")
_WRAP = ("base", "output", "llm_r", "llm_alpha", "backbone_r", "backbone_alpha", "dropout")
_PATHS = ("hf_path", "custom_path", "save_path")
_DIFFERENCES = ("tokenizer_from", "allow_missing", "allow_unexpected")
_SHOWING = ("card", "plot", "heatmap")

KEYWORDS: dict[str, tuple[str, ...]] = {
    "merge_lora": (*_MERGE, *_MERGE_RARELY, *_DIFFERENCES, *_SHOWING, *_WRITING),
    "hf_to_custom": (*_PATHS, *_DIFFERENCES, *_SHOWING, *_WRITING),
    "custom_to_hf": (*_PATHS, *_DIFFERENCES, *_SHOWING, *_WRITING),
    "wrap_lora": (*_WRAP, "seed", "format", *_WRITING),
    "extract_lora": ("checkpoint", "output", "base", "alpha", "adapter_name", *_WRITING),
    "diff": ("a", "b", "names", "plot", *_READING),
    "verify": ("path", "sample", "strict", "against", "revision", *_READING),
    "inspect": ("path", "revision", *_CACHE),
    "environment": (),
}
"""The keywords of each public function; its options are the same, with hyphens."""

COMMANDS = {
    "merge_lora": "merge-lora",
    "hf_to_custom": "hf2custom",
    "custom_to_hf": "custom2hf",
    "wrap_lora": "wrap-lora",
    "extract_lora": "extract-lora",
    "diff": "diff",
    "verify": "verify",
    "inspect": "inspect",
    "environment": "env",
}
"""What each is called on the command line."""

_FUNCTIONS = {command: function for function, command in COMMANDS.items()}
FLAGS = {
    *("overwrite", "sha256", "dry_run", "allow_missing", "allow_unexpected"),
    *("allow_merged_base", "base_is_residual", "strict", "offline", "stream", "private", "heatmap"),
    "names",
}
"""The options that are there or not."""
_CHOICES = {
    "layout": "keep|custom|hf",
    "tokenizer_from": "source|reference",
    "format": "wrapped|peft",
    "expert_order": "peft|unsloth",
    "dtype": "keep|bf16|fp16|fp32",
    "part": "finish",
    "card": "new|base|none",
}

_VALUES = "|".join(sorted({one for values in _CHOICES.values() for one in values.split("|")}))
_OPTION = re.compile(
    rf"(?<![\w/\\.-])--(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w/\\=-])(?: (?P<value>{_VALUES})\b)?"
)
_EITHER = re.compile(r"(?P<one>--[a-z-]+)\|(?P<other>--[a-z-]+)")
_ARGUMENT = re.compile(r"(?<![\w/\\.'=-])CHECKPOINT(?![\w/\\'-]|\.\w)")
_COMMAND = re.compile(rf"`(?P<command>{'|'.join(_FUNCTIONS)})(?P<rest>(?: [^`]*)?)`")

_AGAIN = re.compile(r"\b([Rr])un the same command (again|as then)")

_options: ContextVar[Collection[str] | None] = ContextVar("options", default=None)


@contextlib.contextmanager
def command_line(options: Collection[str]) -> Iterator[None]:
    """Public functions are called by a command with these options: messages stay as they are."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def is_command_line() -> bool:
    """Whether it is the command line that calls, which tells warnings itself."""
    return _options.get() is not None


def spoken(text: str, function: str = "") -> str:
    """A message that a public function, or none of these, has for whoever called it.

    >>> print(spoken("exists. Choose another output, or pass --overwrite.", "merge_lora"))
    exists. Choose another output, or pass `overwrite=True`.
    >>> print(spoken("Run the same command again."))
    Call it again.
    >>> print(spoken("see `merge-lora --adapter A --layout hf`; --layout hf", "diff"))
    see `streamshard.merge_lora(adapter=A, layout="hf")`; `layout="hf"` (of `merge_lora`)
    """
    own = _options.get()
    if "|--" in text:
        text = _EITHER.sub(lambda found: _known(found, own or KEYWORDS.get(function, ())), text)
    if own is not None:
        if "--" in text:
            text = _OPTION.sub(lambda found: _with_owner(found, own, function), text)
        return _COMMAND.sub(r"`streamshard \g<command>\g<rest>`", text) if "`" in text else text
    if "un the same command" in text:
        text = _AGAIN.sub(lambda f: f"{'Call' if f[1] == 'R' else 'call'} it {f[2]}", text)
    if "--" in text or "`" in text or "CHECKPOINT" in text:
        known = KEYWORDS.get(function)
        text = _COMMAND.sub(_call, text)
        text = _OPTION.sub(lambda found: _keyword(found, known), text)
        text = _ARGUMENT.sub("`checkpoint`", text)
    return text


def _known(found: re.Match[str], own: Collection[str]) -> str:
    """Of two options the one that the running command has."""
    one, other = found["one"], found["other"]
    return one if one[2:].replace("-", "_") in own else other


def _with_owner(found: re.Match[str], own: Collection[str], function: str) -> str:
    """An option, with the command that has it if the running one does not; a drop-in calls a function."""
    name = found["name"].replace("-", "_")
    owner = None
    if name not in own and not _in_command(found):
        owner = function if name in KEYWORDS.get(function, ()) else _owner(name)
    return found[0] if owner is None else f"{found[0]} (of streamshard {COMMANDS[owner]})"


def _in_command(found: re.Match[str]) -> bool:
    """Whether an option is told inside a whole command, in backquotes."""
    before = found.string[: found.start()]
    return before.count("`") % 2 == 1


def _keyword(found: re.Match[str], known: Collection[str] | None) -> str:
    """An option as a keyword, with the function that has it if the called one does not."""
    name, value = found["name"].replace("-", "_"), found["value"]
    owner = _owner(name)
    if owner is None:
        return found[0]
    said = name
    if name in FLAGS and not found.string.startswith(" is ", found.end()):
        said = f"{name}=True"
    elif value is not None and value in _CHOICES.get(name, "").split("|"):
        said, value = f'{name}="{value}"', None
    rest = "" if value is None else f" {value}"
    other = "" if known is None or name in known else f" (of `{owner}`)"
    return f"`{said}`{other}{rest}"


def _call(found: re.Match[str]) -> str:
    """A whole command as a call; what is no word in capitals stands for itself."""
    import shlex

    try:
        words = shlex.split(found["rest"])
    except ValueError:  # an apostrophe: no command after all
        return found[0]
    function = _FUNCTIONS[found["command"]]
    positional = [name for name in ("checkpoint", "path", "a", "b") if name in KEYWORDS[function]]
    arguments = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            arguments.append(f"{positional.pop(0)}={_value(word)}" if positional else _value(word))
            continue
        name = word[2:].replace("-", "_")
        value = "True" if name in FLAGS or not words else _value(words.pop(0))
        arguments.append(f"{name}={value}")
    return f"`streamshard.{function}({', '.join(arguments)})`"


def _value(word: str) -> str:
    plain = re.fullmatch(r"[A-Z]+|\d+", word)
    return word if plain else f'"{word}"'


def _owner(name: str) -> str | None:
    """The first function that has a keyword."""
    return next((function for function, names in KEYWORDS.items() if name in names), None)
