"""What a folder without weights is in truth, and which one is meant: for messages."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from streamshard.disk.existence import is_folder, names_in
from streamshard.errors import argument, listed, printable

__all__ = ["folders_of_models", "inner_instead", "what_instead"]


_RUN = re.compile(r"checkpoint-(\d{1,9})")
_STEP = re.compile(r"global_step\d+")
_SHARDS = re.compile(r"global_step\d+|.*_(?:optim|model)_states\.pt|zero_to_fp32\.py")
_FSDP = re.compile(r"pytorch_model_fsdp_\d+|.*\.distcp")
_WEIGHTS = re.compile(r"(?:model|pytorch_model)\b.*\.(?:safetensors|bin)(?:\.index\.json)?")
_CACHE = re.compile(r"(?:models|datasets|spaces)--.+")


def what_instead(folder: Path) -> str | None:
    """What to give in place of a folder that has nothing to read; None if it does not tell.

    Kinds are looked for from the one that says most: a cache of the hub, runs of a training, and states
    of DeepSpeed and FSDP, in which weights lie cut into pieces.
    """
    names = _names(folder)
    if "snapshots" in names and ({"blobs", "refs"} & set(names) or _CACHE.fullmatch(folder.name)):
        return _snapshots(folder / "snapshots")
    if folder.name == "snapshots" and (
        "blobs" in _names(folder.parent) or _CACHE.fullmatch(folder.parent.name)
    ):
        return _snapshots(folder)
    cached = [name for name in names if _CACHE.fullmatch(name)]
    if cached:
        return (
            f"It is a cache of the hub with {listed(cached, 3)}: give the folder of a revision, "
            f"{printable(str(folder / cached[0] / 'snapshots'))}/REVISION."
        )
    runs = sorted((int(run[1]), name) for name in names if (run := _RUN.fullmatch(name)))
    if runs:
        last = runs[-1][1]
        others = f" (or another one of {len(runs)})" if len(runs) > 1 else ""
        return (
            f"It is the folder of a training run: give a checkpoint in it, such as "
            f"{printable(str(folder / last))}{others}."
        )
    if any(_SHARDS.fullmatch(name) for name in names):
        # What is run lies beside the states of all steps.
        step = folder.absolute().name if _STEP.fullmatch(folder.absolute().name) else None
        whole = folder if step is None else folder.parent
        path = argument(whole)
        script = argument(whole / "zero_to_fp32.py")
        if "zero_to_fp32.py" not in _names(whole):
            script = "-m deepspeed.utils.zero_to_fp32"
        return (
            "It has states of DeepSpeed (ZeRO), of which each process wrote a part. Gather its weights "
            f"with DeepSpeed's script: python {script} {path} {path} --safe_serialization"
            + (f" --tag {step}" if step else "")
            + f", then give {path}, with config.json and tokenizer beside them."
        )
    parts = [name for name in names if _FSDP.fullmatch(name)]
    if parts:
        inside = folder if parts[0].endswith(".distcp") else folder / parts[0]
        return (
            "It has states of FSDP, of which each process wrote a part. Gather its weights: "
            f"accelerate merge-weights {argument(inside)} OUTPUT"
        )
    return None


def folders_of_models(folder: Path) -> list[str]:
    """The folders in a folder that have a config and weights of a model, of the first hundred."""
    inner = sorted(_names(folder))[:100]
    return [name for name in inner if _has_model(_names(folder / name))]


def inner_instead(what: str, names: list[str]) -> str:
    """That a folder has what was meant in folders of its own."""
    if len(names) == 1:
        return f"{what} lies in its sub-folder {listed(names)}: give that."
    return f"{what} lies in each of its sub-folders {listed(names)}: give one of these."


def _has_model(names: list[str]) -> bool:
    return "config.json" in names and any(_WEIGHTS.fullmatch(name) for name in names)


def _snapshots(folder: Path) -> str:
    found = _names(folder)
    if not found:
        return "It is a cache of the hub, and nothing of this model is in it: download it again."
    return (
        f"It is a cache of the hub: give the folder of a revision, "
        f"{printable(str(folder / found[-1]))}"
        + (f" (or another one of {len(found)})." if len(found) > 1 else ".")
    )


def _names(folder: Path) -> list[str]:
    """The names in a folder, as far as it can be looked at."""
    with contextlib.suppress(OSError):
        if is_folder(folder):
            return names_in(folder)
    return []
