"""Names of tensors as the model's class has them, without what a trainer put before all of them.

Loaders look for the bare names only: under others they find no weight, and say little or nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

from streamshard.checkpoint.folder import Checkpoint
from streamshard.errors import printable
from streamshard.internvl.detection import layout_of
from streamshard.internvl.model_config import config_layout
from streamshard.notes import note
from streamshard.tensor_names import has_words_of_training, plain_name, without_wrappers

__all__ = ["bare_names", "with_bare_names"]


def with_bare_names(found: Checkpoint) -> Checkpoint:
    """The checkpoint with `bare_names`, and a note of what was taken off, if there was something."""
    names = bare_names(found.tensors, found.config)
    if not names:
        return found
    # A weight rather than a factor, as far as there is one: what comes out of a merge has that name.
    _, bare, given = min((".lora_" in b, b, g) for b, g in names.items() if b != g)
    note(
        f"{printable(str(found.path))}: '{printable(given)}' and the like have words of training in "
        f"their names; these are left out, as loaders look for '{printable(plain_name(bare))}'"
    )
    return dataclasses.replace(found, tensors={b: found.tensors[g] for b, g in names.items()})


def bare_names(names: Collection[str], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Bare names to given ones; empty if all are bare, or if two would become the same.

    What torch.compile, DDP, FSDP and the like put into names goes from those of InternVL, and from
    others if all begin with it. A beginning of another kind (Lightning's) goes if all names have it
    and those of InternVL are behind it, unless the config is of another model: Idefics3 with a tied
    head has nothing but model.vision_model, model.text_model and model.connector.

    >>> bare_names(["module.mlp1.0.weight", "module.language_model.lm_head.weight"])
    {'mlp1.0.weight': 'module.mlp1.0.weight', 'language_model.lm_head.weight': \
'module.language_model.lm_head.weight'}
    >>> bare_names(["policy.mlp1.0.weight", "policy.language_model.lm_head.weight"]).keys()
    dict_keys(['mlp1.0.weight', 'language_model.lm_head.weight'])
    >>> bare_names(["mlp1.0.weight", "language_model.lm_head.weight"])
    {}
    """
    if layout_of(names) is not None and not any(map(has_words_of_training, names)):
        return {}  # as nearly always, without a mapping of 40,000 names
    is_model = config_layout(config or {}) is not None
    is_other = not is_model and bool((config or {}).get("model_type"))
    bare = {without_wrappers(name): name for name in names}
    all_changed = all(name != given for name, given in bare.items())
    if len(bare) < len(names) or not (all_changed or is_model or layout_of(bare) is not None):
        bare = {name: name for name in names}
    if layout_of(bare) is None and len(bare) > 1 and not is_other:
        # Whole words: a name may begin like another one.
        first, *_, last = sorted(bare)
        same = itertools.takewhile(lambda two: two[0] == two[1], zip(first, last, strict=False))
        shared = "".join(one for one, _ in same).rpartition(".")[0]
        inner = {name.removeprefix(f"{shared}."): given for name, given in bare.items()}
        if shared and layout_of(inner) is not None:
            bare = inner
    return {} if all(name == given for name, given in bare.items()) else bare
