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
    "has_lora",
    "is_wrapped",
    "plain_name",
    "without_wrappers",
]


# Modules whose rows are tokens; PEFT may save them whole, and training may add rows.
EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings")
HEADS = ("lm_head", "output")

_WRAPPERS = re.compile(
    r"^(?:(?:_orig_mod|module)\.)+"
    r"|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PEFT = re.compile(r"^(?:base_model\.model\.)+|(?<=^language_model\.)(?:base_model\.model\.)+"
                   r"|(?<=^vision_model\.)(?:base_model\.model\.)+")  # fmt: skip

# What PEFT puts before the names of everything inside the model that it wrapped.
PREFIX = "base_model.model."


def without_wrappers(name: str) -> str:
    """A name without wrappers of training."""
    # All wrappers hold one of these words, and searching for words is quick.
    wrapped = "module." in name or "_orig_mod." in name
    return _WRAPPERS.sub("", name) if wrapped else name


def plain_name(name: str) -> str:
    """A name without wrappers of training and of PEFT."""
    plain = without_wrappers(name)
    return _PEFT.sub("", plain).replace(".base_layer.", ".") if "base_" in plain else plain


def has_lora(names: Iterable[str]) -> bool:
    """Whether any of the names is of a LoRA-wrapped model."""
    return any(".lora_" in name or ".base_layer." in name for name in names)


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether any of the names is of a LoRA-wrapped model.

    >>> is_wrapped(["language_model.base_model.model.lm_head.weight"]), is_wrapped(["mlp1.0.weight"])
    (True, False)
    """
    marks = (PREFIX, ".lora_", ".base_layer.", ".modules_to_save.")
    return any(mark in name for name in names for mark in marks)
