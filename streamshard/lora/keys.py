"""What the tensors of an adapter file are, told by their names.

The names are those of PEFT 0.5 to 0.21, in files (without the adapter's name) and in memory (with
it), behind any wrappers of training. What is not understood is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from streamshard.errors import AdapterError, listed, printable
from streamshard.tensor_names import has_words_of_training, split_key, split_module

__all__ = ["BASE_LAYER", "Keys", "Module", "are_own_names", "read_keys"]


BASE_LAYER = ".base_layer"

_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<factor>lora_[AB])(?:\.(?P<name1>[^.]+))?\.(?P<end>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<name2>[^.]+))?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.(?P<name3>(?!weight$)[^.]+))?(?:\.weight)?"
    r"|(?:token_adapter\.)?(?P<tokens>trainable_tokens_delta)(?:\.(?P<name4>[^.]+))?"
    r")"
)
_NAMED = ("name1", "name2", "name3", "name4")
# A whole tensor beside the factors, perhaps within what PEFT put around its module.
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.modules_to_save(?:\.(?P<name>[^.]+)(?P<inner>(?:\.[^.]+)*))?"
    r"|\.token_adapter\.base_layer|\.base_layer)?\.(?P<end>[^.]+)"
)
# Left over from training, with no effect on the merged weight.
_INERT = re.compile(
    r".*\.(?:lora_velora_embed|lora_monteclora_sampler\.|original_module\.|lora_dropout\.).*|"
    r".*\.lora_velora_embed"
)

# What a key that is not understood says about the kind of adapter.
_OTHER_KINDS = (
    (r"\.lora_E(?:\.[^.]+)?$|\.lora_[AB](?:\.[^.]+)?$|\.ranknum", "a factor as AdaLoRA has"),
    (r"\.lora_diag", "the third factor of KaSA"),
    (r"lora_(?:up|down)|\.alpha$|lora_unet|lora_te", "a kohya-style factor"),
    (r"\.lora_[ab]\.|\.magnitude$", "a torchtune factor"),
    (
        r"hada_|lokr_|oft_|vera_|ia3_|ln_tuning|hra_u|\.bone_|\.miss_|fourierft|vblora|randlora"
        r"|prompt_|adaption_|c3a_|road_|shira_|waveft|delora|osf_",
        "of another method than LoRA",
    ),
    (r"lora_", "a kind of LoRA factor that is not known here"),
)


@dataclass(slots=True)
class Module:
    """The keys of one adapted module, by what they are; "" where there is none."""

    A: str = ""
    B: str = ""
    is_embedding: bool = False
    magnitude: str = ""
    bias: str = ""
    """`lora_B.bias`"""
    tokens: str = ""


@dataclass(slots=True)
class Keys:
    """The keys of an adapter: of modules by name, of whole tensors by name, and inert ones.

    Names are those in the model that was trained, prefix and wrappers removed. A module that
    ends with `.base_layer` (perhaps repeatedly) is a wrapper within another one.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    inert: list[str] = field(default_factory=list)
    twins: list[tuple[str, str]] = field(default_factory=list)
    """Keys of one tensor that PEFT saves twice: a bias of a module that is saved whole."""


def are_own_names(keys: Collection[str], base: Iterable[str]) -> bool:
    """Whether words as training puts them into names are of the base's own names here."""
    if not any(has_words_of_training(key) for key in keys):
        return False
    named = [split_key(key, bare=False)[1] for key in keys]
    if named == [split_key(key)[1] for key in keys]:
        return False
    known = set()
    for name in base:
        known |= {name[:at] for at, sign in enumerate(name) if sign == "."} | {name}
    return all(split_module(name)[0] in known for name in named)


def read_keys(
    keys: Iterable[str], where: str, adapter_name: str | None = None, *, bare: bool = True
) -> Keys:
    """Sort the keys of one adapter; `where` is what messages call its file.

    Where keys of several adapters lie in one file, `adapter_name` says which is meant. Names are
    `bare` of wrappers of training, or as they are. Raises `AdapterError` for what is not understood,
    twice there, or has no partner.
    """
    found = Keys()
    beginnings: dict[str, str] = {}
    names: set[str] = set()
    saved_names: set[str] = set()
    # Told when it is known that there are no keys of several adapters, which explains more.
    problem: AdapterError | None = None
    for key in keys:
        beginning, plain = split_key(key, bare=bare)
        plain = "".join(split_module(plain))
        if _INERT.fullmatch(plain):
            found.inert.append(key)
            continue
        part = _PART.fullmatch(plain)
        match = part or _whole(key, plain, where)
        own = _adapter_name(match)
        if part is not None:
            names.add(own or "")
        elif own is not None:
            saved_names.add(own)
        if adapter_name is not None and own not in (None, adapter_name):
            continue
        beginnings.setdefault(beginning, key)
        try:
            (_add_whole if part is None else _add_part)(found, match, key, where)
        except AdapterError as error:
            problem = problem or error
    # PEFT leaves its name in the biases of a module that has modules itself.
    if adapter_name is not None or names != {""} or len(saved_names) > 1:
        names |= saved_names
    _check_names(names, adapter_name, where)
    if problem is not None:
        raise problem
    if len(beginnings) > 1:
        raise AdapterError(
            f"{where}: keys begin in different ways, for example {listed(beginnings.values())}. One "
            "prefix for all is expected: the file mixes several models."
        )
    _check_partners(found, where)
    return found


def _whole(key: str, plain: str, where: str) -> re.Match[str]:
    kind = next((kind for pattern, kind in _OTHER_KINDS if re.search(pattern, plain)), None)
    match = None if kind else _WHOLE.fullmatch(plain)
    if match is None or BASE_LAYER + "." in match["module"] + ".":
        raise AdapterError(
            f"{where}: tensor '{printable(key)}' is {kind or 'not understood'}, and cannot be merged. "
            "Nothing is left out silently: merge this adapter with the tool that trained it, or "
            "save it as PEFT LoRA."
        )
    return match


def _adapter_name(match: re.Match[str]) -> str | None:
    groups = _NAMED if match.re is _PART else ("name",)
    return next((match[group] for group in groups if match[group] is not None), None)


def _add_part(found: Keys, part: re.Match[str], key: str, where: str) -> None:
    name = part["module"]
    if BASE_LAYER in name and re.search(r"\.base_layer\.(?!base_layer(?:\.|$))", name):
        raise AdapterError(
            f"{where}: tensor '{printable(key)}' is of a layer within an adapted layer, as PEFT has for "
            "the out_proj of MultiheadAttention, where PEFT itself adds the update twice. It cannot "
            "be merged: train without that module as a target."
        )
    module = found.modules.get(name)
    if module is None:
        module = found.modules[name] = Module()
    if part["magnitude"]:
        role = "magnitude"
    elif part["tokens"]:
        role = "tokens"
    elif part["end"] == "bias":
        role = "bias" if part["factor"] == "lora_B" else ""
    else:
        role = (part["factor"] or part["embedding"])[-1]
    if not role or (part["embedding"] and module.A + module.B and not module.is_embedding):
        raise AdapterError(
            f"{where}: tensor '{printable(key)}' does not go with the other tensors of that module. "
            "The file mixes two kinds of adapters: save one alone."
        )
    module.is_embedding = module.is_embedding or bool(part["embedding"])
    other = getattr(module, role)
    if other:
        raise _twice(other, key, name, where)
    setattr(module, role, key)


def _add_whole(found: Keys, match: re.Match[str], key: str, where: str) -> None:
    name = f"{match['module']}{match['inner'] or ''}.{match['end']}"
    other = found.whole.setdefault(name, key)
    if other != key:
        if (".modules_to_save." in key) == (".modules_to_save." in other):
            raise _twice(other, key, name, where)
        found.twins.append((other, key))


def _twice(one: str, other: str, name: str, where: str) -> AdapterError:
    return AdapterError(
        f"{where}: '{printable(one)}' and '{printable(other)}' are the same tensor of "
        f"'{printable(name)}'. Remove one."
    )


def _check_names(names: set[str], wanted: str | None, where: str) -> None:
    if wanted is not None and wanted not in names:
        found = sorted(name for name in names if name)
        raise AdapterError(
            f"{where}: has no adapter '{printable(wanted)}': "
            + (
                f"found {listed(found)}. Choose one of these."
                if found
                else "its keys have no adapter's "
                "name, so it is one alone. Leave --adapter-name out."
            )
        )
    if wanted is None and len(names) > 1:
        found = sorted(name for name in names if name)
        raise AdapterError(
            f"{where}: holds several adapters ({listed(found)}) or keys with and without "
            "an adapter name, and nothing says which one is meant. Choose one with --adapter-name."
        )


def _check_partners(found: Keys, where: str) -> None:
    lone = [
        module.A or module.B or module.magnitude or module.bias
        for module in found.modules.values()
        if bool(module.A) != bool(module.B)
        or (not module.A and (module.magnitude or module.bias))
        or (module.tokens and module.A)
    ]
    if lone:
        raise AdapterError(
            f"{where}: {listed(lone)}: the partner (lora_A or lora_B) is missing. "
            "The file is incomplete: save or copy the adapter again."
        )
