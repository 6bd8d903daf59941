"""LoRA-wrapped training checkpoints as what they are: a base, and an adapter without a config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from streamshard.checkpoint.folder import Checkpoint, open_checkpoint
from streamshard.commands.bare_names import with_bare_names
from streamshard.commands.beside_wrapped import check_beside_wrapped
from streamshard.commands.identify import Model
from streamshard.disk.paths import PathLike
from streamshard.errors import AdapterError, InputError, UsageError, argument, listed, printable
from streamshard.internvl.detection import layout_of
from streamshard.internvl.lora_targets import FLAGS, PARTS, upstream_alpha
from streamshard.internvl.model_config import config_layout
from streamshard.internvl.shapes import GATHER, not_gathered
from streamshard.lora.adapter import Adapter
from streamshard.lora.settings import LoraSettings
from streamshard.lora.wrapped_names import Unwrapped, unwrap
from streamshard.notes import note
from streamshard.tensor_names import is_wrapped
from streamshard.values import frozen

__all__ = ["Wrapped", "WrappedSettings", "check_flags", "open_wrapped", "read_wrapped"]


@frozen
class WrappedSettings(LoraSettings):
    """Ranks as the tensors have them, and alpha as given or, by upstream's convention, `2 * r`."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    given_alpha: float | None = None

    def rank(self, module: str) -> int:
        return self.ranks[module]

    def alpha(self, module: str) -> float:
        own = float(upstream_alpha(self.ranks[module]))
        return own if self.given_alpha is None else self.given_alpha


@frozen
class Wrapped:
    """A wrapped checkpoint, its names told apart, and the rank of every pair."""

    checkpoint: Checkpoint
    names: Unwrapped
    ranks: Mapping[str, int]

    @property
    def has_base(self) -> bool:
        """Whether there is anything that the pairs are added to; else only what was trained was saved."""
        return any(
            name.startswith(f"{module}.") for module in self.ranks for name in self.names.base
        )

    def without_base(self) -> InputError:
        """The error for a checkpoint of nothing but what was trained."""
        path = argument(self.checkpoint.path)
        return InputError(
            f"{printable(str(self.checkpoint.path))}: holds the pairs of {len(self.ranks)} modules, but "
            "none of the weights that these are added to: only what was trained was saved. Use the model "
            f"that the training started from: `extract-lora {path} --base MODEL --output ADAPTER`, "
            "then `merge-lora --adapter ADAPTER --base MODEL`."
        )


def read_wrapped(
    path: PathLike,
    *,
    alpha: float | None = None,
    adapter_name: str | None = None,
    reference: PathLike | None = None,
    layout: str = "keep",
    instead: str = "",
) -> Wrapped:
    """Open a wrapped checkpoint; `alpha` is what the user says it is.

    A checkpoint without config.json has that of `reference`, if one is given that is not of the other
    `layout`, to which it is converted then.

    `instead` is what to do with a checkpoint without pairs.

    Raises `InputError` or `AdapterError` if it has no pairs, others than its config says and `alpha`
    is not given, or more of an adapter than can be understood without its config.
    """
    found = with_bare_names(open_checkpoint(path))
    where = printable(str(found.path))
    if alpha is not None and not (math.isfinite(alpha) and alpha):
        raise UsageError(f"--alpha is {alpha}; a number other than 0 was expected.")
    if not is_wrapped(found.tensors):
        raise InputError(
            f"{where}: no LoRA found: it has no lora_A and lora_B tensors, so there is nothing to do. "
            "A full fine-tune, also of the projector alone, is complete as it is; "
            + (
                instead
                or f"for an adapter of it: `merge-lora --adapter ADAPTER --base {argument(found.path)}`."
            )
        )
    empty = [name for name, tensor in found.tensors.items() if not tensor.nbytes]
    if empty:
        raise not_gathered(where, empty)
    inside = unwrap(found.tensors, adapter_name)
    if not inside.pairs:
        raise InputError(
            f"{where}: its names are those of a wrapped model, but it has no lora_A and lora_B: the "
            "pairs are lost, or were merged before. Save the checkpoint again."
        )
    found = check_beside_wrapped(found, inside.base)
    ranks = {module: _rank(found, pair.A, where) for module, pair in inside.pairs.items()}
    note(*found.warnings, *check_flags(found, ranks, where, alpha=alpha))
    if reference is not None:
        found = _with_config(found, reference, layout)
    Model(found).check(inside.base)
    several = sorted({*ranks.values()})
    if alpha is not None and len(several) > 1:
        note(
            f"pairs have the ranks {', '.join(map(str, several))}, and --alpha {alpha:g} is taken for "
            "all of them, so that their scales differ; without it alpha is 2 r of each"
        )
    for part, depth in inside.depths.items():
        if depth > 1:
            note(
                f"{part or 'the model'} is wrapped {depth} times: a training that was resumed from a "
                "wrapped checkpoint. PEFT then begins the pairs anew, so what the earlier training had "
                "learned in them is NOT in this file; the pairs that are in it are used"
            )
    _refuse_others(inside, where)
    return Wrapped(found, inside, ranks)


def _with_config(found: Checkpoint, reference: PathLike, goal: str) -> Checkpoint:
    """The checkpoint with the config of `reference` if it has none itself; its shapes must fit that.

    Raises `InputError` for a reference of the other layout, whose files fit no class of this one.
    """
    own = layout_of(found.tensors) or config_layout(found.config or {})
    if goal not in ("keep", own):
        return found
    donor = open_checkpoint(reference, needs_weights=False)
    where, layout = printable(str(donor.path)), config_layout(donor.config or {})
    if own is not None and layout not in (None, own):
        raise InputError(
            f"{where}: is of the {layout} layout, but {printable(str(found.path))} of the {own} one: "
            f"give the original model in the {own} layout, or --layout {layout} if that is meant."
        )
    if found.config is not None or donor.config is None:
        return found
    note(f"{printable(str(found.path))}: has no config.json; the output's is that of {where}")
    return dataclasses.replace(found, config={**donor.config, **_no_flags(donor.config)})


def _no_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRA flags as they are of a model whose pairs are merged: of a layout that has some."""
    return {} if config_layout(config) == "hf" else dict.fromkeys(FLAGS, 0)


def open_wrapped(
    path: PathLike,
    *,
    alpha: float | None = None,
    adapter_name: str | None = None,
    reference: PathLike | None = None,
    layout: str = "keep",
) -> tuple[Checkpoint, list[Adapter]]:
    """The base inside a wrapped checkpoint, and its adapter.

    The flags of the base's config are 0. Raises what `read_wrapped` does, with the same keywords.
    """
    wrapped = read_wrapped(
        path, alpha=alpha, adapter_name=adapter_name, reference=reference, layout=layout
    )
    found, inside, ranks = wrapped.checkpoint, wrapped.names, wrapped.ranks
    if not wrapped.has_base:
        raise wrapped.without_base()
    config = dict(found.config) if found.config is not None else None
    if config is not None:
        config |= dict.fromkeys(FLAGS, 0)
    base = dataclasses.replace(
        found,
        tensors={plain: found.tensors[given] for plain, given in inside.base.items()},
        config=config,
    )
    settings = WrappedSettings(
        r=max(ranks.values()),
        lora_alpha=float(upstream_alpha(max(ranks.values()))) if alpha is None else alpha,
        modules_to_save=tuple(name.rpartition(".")[0] for name in inside.saved),
        use_dora=any("lora_magnitude_vector" in key for key in inside.tensors),
        ranks=ranks,
        given_alpha=alpha,
    )
    tensors = {key: found.tensors[given] for key, given in inside.tensors.items()}
    adapter = Adapter(printable(str(found.path)), settings, tensors)
    return base, [adapter]


def _rank(found: Checkpoint, name: str, where: str) -> int:
    shape = found.tensors[name].shape
    if len(shape) != 2 or not all(shape):
        raise AdapterError(
            f"{where}: '{printable(name)}' has shape {list(shape)}; a matrix was expected. "
            f"{GATHER}."
        )
    return shape[0]


def _refuse_others(inside: Unwrapped, where: str) -> None:
    """Refuse what needs a config that such a checkpoint does not have."""
    unknown = {
        given: kind for given, kind in inside.others.items() if given not in inside.saved.values()
    }
    if unknown:
        given, kind = next(iter(unknown.items()))
        raise AdapterError(
            f"{where}: '{printable(given)}' is {kind}, which InternVL's trainer does not save and "
            "which cannot be understood without the adapter's config. Save the adapter with PEFT's "
            "save_pretrained, and fold it in: `merge-lora --adapter ADAPTER --base MODEL`."
        )


def check_flags(
    found: Checkpoint, ranks: Mapping[str, int], where: str, *, alpha: float | None
) -> list[str]:
    """Compare the ranks in `config.json` with those of the tensors; returns warnings.

    The keys decide what is wrapped; a flag of 0 beside pairs is stale. A rank that is not that of the
    tensors is of another checkpoint, whose alpha is not this one's: `AdapterError` unless `alpha`
    is given.
    """
    warnings = []
    starts = {flag: PARTS[part]["custom"] for flag, part in FLAGS.items()}
    for flag, start in starts.items():
        stated = (found.config or {}).get(flag) or 0
        own = sorted({rank for module, rank in ranks.items() if module.startswith(start)})
        if stated and not own:
            raise AdapterError(
                f"{where}: {flag} in config.json is {stated}, but there are no pairs in "
                f"{start[:-1]}. They are lost, or the config is of another checkpoint: correct the "
                "config, or save the checkpoint again."
            )
        if stated and own != [stated] and alpha is None:
            raise AdapterError(
                f"{where}: {flag} in config.json is {stated}, but the pairs have rank "
                f"{', '.join(map(str, own))}: the config is not of this checkpoint, so alpha is not "
                "known. Correct the config, or say --alpha."
            )
        if own and not stated and found.config is not None:
            warnings.append(
                f"{flag} in config.json is 0 although there are pairs of rank "
                f"{', '.join(map(str, own))}; they are used with "
                + (
                    "alpha = 2 r, as InternVL's trainer has it"
                    if alpha is None
                    else f"alpha {alpha:g}"
                )
            )
    outside = [m for m in ranks if not m.startswith(tuple(starts.values()))]
    if outside and alpha is None:
        raise AdapterError(
            f"{where}: {listed(outside, 3)} are in neither language_model nor vision_model, where "
            "InternVL's trainer puts LoRA with alpha = 2 r. Say which alpha they have: --alpha."
        )
    return warnings
