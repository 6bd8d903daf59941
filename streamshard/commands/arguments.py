"""What a public command is given from Python: which keywords there are, and what their values may be.

What is wrong is told before anything is opened, with the keyword and what to write instead: a misspelt
keyword or one that another tool has, a model where a path belongs, text where a number does. What means
one thing in several ways is made one: adapters and weights are lists here.
"""

from __future__ import annotations

import inspect
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamshard.errors import UsageError, printable
from streamshard.wording import FLAGS, KEYWORDS, is_command_line

__all__ = ["arguments", "shown", "signature_of"]

_WHOLE = (numbers.Integral, type(None))
_NUMBER = (numbers.Real, type(None))
_CALLED = (Callable, type(None))
_KINDS: dict[str, tuple[tuple[Any, ...], str]] = {
    # "no" and "false" would mean yes.
    **dict.fromkeys(FLAGS, ((numbers.Integral, type(None)), "True or False")),
    **dict.fromkeys(("workers", "llm_r", "backbone_r"), (_WHOLE, "a whole number")),
    "seed": ((numbers.Integral,), "a whole number"),
    **dict.fromkeys(("alpha", "llm_alpha", "backbone_alpha", "dropout"), (_NUMBER, "a number")),
    "adapter_name": ((str, type(None)), "a name"),
    "part": ((str, type(None)), "I/N or finish"),
    "scheduler": ((str, type(None)), "an address, or the name of a file,"),
    "progress": ((bool, *_CALLED), "True, False or a function"),
    **dict.fromkeys(("on_plan", "on_step", "on_total"), (_CALLED, "a function")),
}
"""What values are, of the keywords that do not say so themselves where they are read."""
_PATHS = {
    *("base", "checkpoint", "output", "reference", "hf_path", "custom_path", "save_path"),
    *("a", "b", "path", "plot", "cache_dir"),
}
"""The keywords that are one path."""
_ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("output", "out", "output_dir", "output_path"), ("output", "save_path")),
    **dict.fromkeys(("save_path", "save_dir", "save_directory"), ("output", "save_path")),
    **dict.fromkeys(
        ("model", "model_path", "base_model", "model_name_or_path"),
        ("base", "checkpoint", "path", "custom_path"),
    ),
    **dict.fromkeys(("lora", "lora_path", "adapter_path", "peft_model"), ("adapter",)),
    **dict.fromkeys(("checkpoint", "folder", "input"), ("checkpoint", "path", "base")),
    **dict.fromkeys(("path",), ("checkpoint", "base")),
    **dict.fromkeys(("r", "rank", "lora_r", "lora_rank"), ("llm_r",)),
    **dict.fromkeys(("alpha", "lora_alpha"), ("llm_alpha", "alpha")),
    "lora_dropout": ("dropout",),
    **dict.fromkeys(("weights", "scale", "scaling"), ("weight",)),
    **dict.fromkeys(("threads", "num_workers", "n_jobs"), ("workers",)),
    **dict.fromkeys(("memory", "max_ram"), ("max_memory",)),
    **dict.fromkeys(("force", "exist_ok"), ("overwrite",)),
    **dict.fromkeys(("torch_dtype", "precision"), ("dtype",)),
}
"""Keywords as other functions and tools call them, and which ones may be meant, best first."""
_ON_SCREEN = {
    "json": "What is returned is that document: `json.dumps` writes it.",
    **dict.fromkeys(("quiet", "verbose"), "Nothing is printed; `progress=True` shows a bar."),
    "exit_code": "The report says it, under 'differ'.",
    "heatmap": "The report has it, as 'heat_map'.",
}
"""What the command line has of its own, and what there is in its place."""


def signature_of(command: Callable[..., Any]) -> inspect.Signature:
    """The signature of a command with every keyword in it: those of `Unpack` by their names."""
    plain, own = inspect.signature(command), []
    for one in plain.parameters.values():
        if one.kind is not one.VAR_KEYWORD:
            own.append(one)
            continue
        typed = command.__globals__[str(one.annotation).removeprefix("Unpack[").rstrip("]")]
        own += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name in FLAGS else _DEFAULTS.get(name),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in typed.__annotations__.items()
        ]
    return plain.replace(parameters=own)


_DEFAULTS = {"dtype": "keep", "io": "auto", "card": "new"}


def arguments(
    name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The keywords of a command with their values, as it takes them.

    Raises `TypeError` for keywords that are not known or missing, `UsageError` for values.
    """
    known = signature.parameters.values()
    places = [one.name for one in known if one.kind is one.POSITIONAL_OR_KEYWORD]
    needed = [one.name for one in known if one.default is one.empty]
    if len(args) > len(places):
        raise TypeError(
            f"{name}() takes {len(places) or 'no'} arguments by position, not {len(args)}: name them, "
            f"{_example(name)}."
        )
    for keyword in kwargs:
        if keyword not in signature.parameters:
            raise TypeError(
                f"{name}() got an unexpected keyword argument '{keyword}'. {_meant(name, keyword)}"
            )
    twice = [one for one in places[: len(args)] if one in kwargs]
    if twice:
        raise TypeError(f"{name}() got '{twice[0]}' twice: by position, and by its name.")
    given = {**dict(zip(places, args, strict=False)), **kwargs}
    missing = [one for one in needed if one not in given]
    if missing:
        raise TypeError(f"{name}() needs {' and '.join(missing)}, too: {_example(name)}.")
    for keyword, value in given.items():
        _check(keyword, value, may_be_none=keyword not in needed)
    return given | _adapters(given)


def _example(name: str) -> str:
    """How a command is called at least."""
    first = _FIRST.get(name, KEYWORDS[name][:2])
    return f"{name}({', '.join(f'{keyword}=…' for keyword in first)})"


_FIRST = {
    "merge_lora": ("base", "adapter", "output"),
    "hf_to_custom": ("hf_path", "custom_path", "save_path"),
    "custom_to_hf": ("custom_path", "hf_path", "save_path"),
    "wrap_lora": ("base", "output", "llm_r"),
    "verify": ("path",),
    "inspect": ("path",),
}


def _meant(name: str, keyword: str) -> str:
    """What to say of a keyword that there is none of."""
    known, plain = KEYWORDS[name], keyword.replace("-", "_").lower()
    if plain in _ON_SCREEN:
        return _ON_SCREEN[plain]
    meant = [one for one in _ALIASES.get(plain, ()) if one in known]
    import difflib

    # Of less likeness are words that mean something else.
    near = meant or difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    return f"Did you mean '{near[0]}'?" if near else f"It knows {', '.join(known) or 'none'}."


def _check(keyword: str, value: object, *, may_be_none: bool) -> None:
    """Raise `UsageError` for a value that is of no type that its keyword takes."""
    if keyword in _PATHS:
        if value is not None or not may_be_none:
            _check_path(keyword, value)
        return
    types, what = _KINDS.get(keyword, ((object,), ""))
    number = isinstance(value, bool) and types in (_WHOLE, _NUMBER, (numbers.Integral,))
    if not isinstance(value, types) or (number and keyword not in FLAGS):
        raise UsageError(f"`{keyword}` is {shown(value)}; {what} was expected.")


def _check_path(keyword: str, value: object) -> None:
    # The command line has words of its own for that, where paths are read.
    if isinstance(value, (str, bytes)) and not value and not is_command_line():
        raise UsageError(f"`{keyword}` is empty; a path was expected.")
    if isinstance(value, (str, bytes, os.PathLike)):
        return
    hint = ""
    if isinstance(value, Mapping) and isinstance(value.get("output"), str):
        hint = " Of a report that is its 'output'."
    elif isinstance(value, Mapping) or hasattr(value, "state_dict"):
        hint = " Save it with `save_pretrained` first, and give that folder."
    raise UsageError(f"`{keyword}` is {shown(value)}; a path was expected.{hint}")


def shown(value: object) -> str:
    """A value in a message: itself if it is small, else what it is."""
    if value is None or isinstance(value, (str, bytes, numbers.Number)):
        return printable(repr(value), 60)
    kind = type(value)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    return f"of type {module}{kind.__qualname__}"


def _adapters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Adapters and weights as lists, whose entries belong together; what is one path stays one."""
    adapter, weight = given.get("adapter"), given.get("weight")
    made: dict[str, Any] = {}
    if isinstance(adapter, Mapping) and adapter and all(map(_is_path, adapter)):
        if weight is not None:
            raise UsageError("`adapter` has weights itself, so `weight` cannot be given, too.")
        made = {"adapter": [*adapter], "weight": [_weight(*item) for item in adapter.items()]}
    else:
        if adapter is not None:
            made["adapter"] = adapter if _is_path(adapter) else _paths(adapter)
        if weight is not None:
            made["weight"] = _numbers(weight)
    for number, path in enumerate(made["adapter"] if isinstance(made.get("adapter"), list) else ()):
        _check_path(f"adapter[{number}]", path)
    return made


def _is_path(value: object) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))


def _paths(adapter: object) -> list[Any]:
    if isinstance(adapter, (set, frozenset)):
        raise UsageError("`adapter` is a set, which has no order; give a list of paths.")
    if isinstance(adapter, Mapping) and not adapter:
        return []
    if isinstance(adapter, Mapping) or not isinstance(adapter, Iterable):
        _check_path("adapter", adapter)
    if hasattr(adapter, "state_dict"):  # a module of a few is iterable
        _check_path("adapter", adapter)
    return list(adapter)  # type: ignore[call-overload, no-any-return]


def _weight(path: Any, weight: Any) -> float:
    """The weight of one adapter in a mapping."""
    try:
        (one,) = _numbers(weight)
    except (UsageError, ValueError) as error:
        raise UsageError(
            f"`adapter` has for {shown(path)} what is {shown(weight)}; a number, its weight, was "
            "expected."
        ) from error
    return one


def _numbers(weight: Any) -> list[float]:
    """Weights of adapters: one number, or several; those of numpy and torch, too."""
    wrong = UsageError(
        f"`weight` is {shown(weight)}; a number was expected, or a list of them in the order of "
        "`adapter`."
    )
    if isinstance(weight, (str, bytes, bool, set, frozenset, Mapping)):
        raise wrong
    several = weight.tolist() if hasattr(weight, "tolist") else weight
    several = list(several) if isinstance(several, Iterable) else [several]
    if any(isinstance(one, (str, bytes, bool)) for one in several):
        raise wrong
    try:
        return [float(one) for one in several]
    except (TypeError, ValueError, RuntimeError) as error:
        raise wrong from error
