"""What training and PEFT put around the names of tensors, and which names are embeddings and heads.

Nothing here knows a model: these are the words that every room may use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "EMBEDDINGS",
    "HEADS",
    "PREFIX",
    "factors_among",
    "has_words_of_training",
    "is_of_tokens",
    "is_wrapped",
    "peft_prefix",
    "plain_name",
    "split_key",
    "split_module",
    "without_wrappers",
]


# Modules whose rows are tokens; PEFT may save them whole, and training may add rows.
EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings")
HEADS = ("lm_head", "output")

# What PEFT puts before the names of everything inside the model that it wrapped.
PREFIX = "base_model.model."

# What torch.compile, DDP and Megatron put before all names; FSDP and the like put theirs inside, too.
_BEFORE = r"_orig_mod|module"
_INSIDE = r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_PREFIXES = rf"(?:{re.escape(PREFIX)})+"

_WRAPPERS = re.compile(rf"^(?:(?:{_BEFORE})\.)+|{_INSIDE}")
_WRAPPERS_INSIDE = re.compile(_INSIDE)
_PEFT = re.compile(
    rf"^{_PREFIXES}|(?<=^language_model\.){_PREFIXES}|(?<=^vision_model\.){_PREFIXES}"
)
_PEFT_ANYWHERE = re.compile(rf"(?:^|(?<=\.)){_PREFIXES}")
_OUTSIDE = re.compile(rf"^(?:(?:{_BEFORE}|\w+_wrapped_module)\.)*{re.escape(PREFIX)}")
_BEHIND = re.compile(
    r"\.(?:lora_\w+|base_layer|token_adapter|trainable_tokens_delta|modules_to_save|"
    r"original_module)(?=\.|$)"
)
_BEGINNING = re.compile(rf"(?:module\.|{re.escape(PREFIX)})*")


def without_wrappers(name: str) -> str:
    """A name without wrappers of training."""
    # All wrappers hold one of these words, and searching for words is quick.
    wrapped = "module." in name or "_orig_mod." in name
    return _WRAPPERS.sub("", name) if wrapped else name


def plain_name(name: str) -> str:
    """A name without wrappers of training and of PEFT."""
    plain = without_wrappers(name)
    return _PEFT.sub("", plain).replace(".base_layer.", ".") if "base_" in plain else plain


def split_key(key: str, *, bare: bool = True) -> tuple[str, str]:
    """A key of an adapter as what training and PEFT put before it, and the rest.

    The rest is `bare` of everything that training and PEFT put into names, or else the name that
    the model had which PEFT wrapped: this may have such words of its own.

    >>> split_key("module.base_model.model.lm_head._fsdp_wrapped_module.weight")
    ('module.base_model.model.', 'lm_head.weight')
    >>> split_key("module.base_model.model.module.lm_head.weight", bare=False)
    ('module.base_model.model.', 'module.lm_head.weight')
    """
    if not has_words_of_training(key):  # most keys, and searching for words is quick
        rest = key.removeprefix(PREFIX)
        return key[: len(key) - len(rest)], rest
    if not bare:
        match = _OUTSIDE.match(key)
        beginning = match[0] if match else ""
        return beginning, key.removeprefix(beginning)
    plain = _WRAPPERS_INSIDE.sub("", key)
    match = _BEGINNING.match(plain)
    beginning = match[0] if match else ""
    return beginning, _PEFT_ANYWHERE.sub("", plain.removeprefix(beginning))


def has_words_of_training(key: str) -> bool:
    """Whether a key of an adapter has more words of training in it than PEFT's usual prefix."""
    rest = key.removeprefix(PREFIX)
    return "module." in rest or "_orig_mod." in rest or PREFIX in rest


def split_module(name: str) -> tuple[str, str]:
    """A tensor of an adapter as its module, and what PEFT put behind that.

    >>> split_module("model.layers.0.q_proj.lora_A.default._fsdp_wrapped_module.weight")
    ('model.layers.0.q_proj', '.lora_A.default.weight')
    """
    mark = _BEHIND.search(name)
    at = len(name) if mark is None else mark.start()
    behind = name[at:]
    wrapped = "module." in behind or "_orig_mod." in behind
    return name[:at], _WRAPPERS_INSIDE.sub("", behind) if wrapped else behind


def peft_prefix(name: str) -> re.Match[str] | None:
    """Where PEFT's prefix is in a name, perhaps several times in a row; None if it is nowhere."""
    return _PEFT_ANYWHERE.search(name)


def is_of_tokens(name: str) -> bool:
    """Whether a tensor is the weight of an embedding or head, by its name.

    >>> is_of_tokens("language_model.lm_head.weight"), is_of_tokens("lm_head.bias")
    (True, False)
    """
    words = name.split(".")
    return words[-1] == "weight" and len(words) > 1 and words[-2] in (*EMBEDDINGS, *HEADS)


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether any of the names is of a model that PEFT wrapped, with or without its pairs.

    >>> is_wrapped(["language_model.base_model.model.lm_head.weight"]), is_wrapped(["mlp1.0.weight"])
    (True, False)
    """
    marks = (PREFIX, ".lora_", ".base_layer.", ".modules_to_save.")
    return any(mark in name for name in names for mark in marks)


def factors_among(names: Iterable[str], sides: str = "AB") -> list[str]:
    """The names of LoRA factors: what a wrapped model's pairs are called.

    >>> factors_among(["q_proj.lora_A.default.weight", "q_proj.base_layer.weight"])
    ['q_proj.lora_A.default.weight']
    """
    marks = [f".lora_{side}." for side in sides]
    return [name for name in names if any(mark in name for mark in marks)]
