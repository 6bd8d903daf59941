"""Whether an adapter's config selects the modules that have pairs in its file.

PEFT loads what the config selects and drops the rest without a word; others load what is there. The file
is what was trained, and so all of it is merged, and told.
"""

from __future__ import annotations

from streamshard.errors import listed
from streamshard.lora.adapter import AdapterPlan
from streamshard.tensor_names import is_of_tokens, peft_prefix, split_module, without_wrappers

__all__ = ["not_selected"]

_WHY = {
    "target_modules": "target_modules does not name them",
    "exclude_modules": "exclude_modules names them",
    "modules_to_save": "modules_to_save names them, to be trained whole",
    "layers_to_transform": "layers_to_transform lacks their layers",
}


def not_selected(plan: AdapterPlan) -> list[str]:
    """Warnings of pairs whose modules the config leaves out.

    A pattern that fits no module of the file was written for other spellings of the names. Where PEFT
    wrapped a part of the model, names may be those within it. Tied embeddings that PEFT adapts along
    need not be named.
    """
    settings = plan.adapter.settings
    selection, tied = settings.selection, settings.ensure_weight_tying
    pairs = {name: module.A for name, module in plan.keys.modules.items() if module.A}
    left = {
        name: field
        for name, key in pairs.items()
        if name not in plan.parameters
        and not selection.takes_parameter(plan.weight(name))
        and not (tied and is_of_tokens(plan.weight(name)))
        and (field := selection.leaves_out(name))
        and selection.leaves_out(_within(key))
    }
    if not left:
        return []
    where = plan.adapter.where
    missed = isinstance(selection.targets, str) and {*left.values()} == {"target_modules"}
    if missed and len(left) == len(pairs):
        return [
            f"{where}: target_modules of the config is a pattern that fits none of the modules that have "
            f"pairs in the file ({listed(left, 1)}): PEFT would find nothing to load; all of them are "
            "merged"
        ]
    field = next(iter(left.values()))
    named = [name for name, why in left.items() if why == field]
    return [
        f"{where}: {len(named)} of {len(pairs)} modules that have pairs in the file are left out by the "
        f"config ({listed(named, 3)}): {_WHY[field]}. PEFT would drop these pairs without a word; all of "
        "them are merged. If they were not trained, remove them from the file"
    ]


def _within(key: str) -> str:
    """The module of a key as it is called in the part of the model that PEFT wrapped."""
    name = split_module(without_wrappers(key))[0]
    while (prefix := peft_prefix(name)) is not None:
        name = name[prefix.end() :]
    return name
