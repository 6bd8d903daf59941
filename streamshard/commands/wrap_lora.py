"""`wrap-lora`: a checkpoint with fresh LoRA pairs, or the pairs alone as a PEFT adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

from streamshard.checkpoint.file_names import ADAPTER_CONFIG_NAME, ADAPTER_NAME, MODEL_CONFIG_NAME
from streamshard.checkpoint.folder import open_checkpoint
from streamshard.commands.bare_names import with_bare_names
from streamshard.commands.identify import Model
from streamshard.commands.left_behind import note_left_behind
from streamshard.commands.public import public
from streamshard.commands.whose_tokenizer import note_beyond
from streamshard.commands.written_config import config_bytes
from streamshard.disk.far import known_as
from streamshard.disk.paths import PathLike
from streamshard.engine.job import Job, Options, OutputOptions
from streamshard.engine.output_path import check_places
from streamshard.engine.report import Report
from streamshard.engine.run import run
from streamshard.errors import InputError, UsageError, listed
from streamshard.internvl.detection import layout_of
from streamshard.internvl.families import FAMILIES, Layout
from streamshard.internvl.lora_targets import (
    PARTS,
    TASK_TYPES,
    UPSTREAM,
    UPSTREAM_DROPOUT,
    beginning,
    check_complete,
    flags_of,
    parameters,
    target_ends,
    target_modules,
    upstream_alpha,
)
from streamshard.internvl.model_config import Dims
from streamshard.internvl.spelling import in_model
from streamshard.lora.base_checks import check_base
from streamshard.lora.new_pairs import initial_pairs, wrap
from streamshard.lora.saved_adapter import adapter_config, adapter_key
from streamshard.notes import note
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.torch_random import MAX_SEED

__all__ = ["wrap_lora"]

MAX_RANK = 65_536  # more than any weight has rows or columns to adapt; each rank takes draws


@public
def wrap_lora(
    *,
    base: PathLike,
    output: PathLike | None = None,
    llm_r: int | None = None,
    llm_alpha: float | None = None,
    backbone_r: int | None = None,
    backbone_alpha: float | None = None,
    dropout: float | None = None,
    seed: int = 0,
    format: Literal["wrapped", "peft"] = "wrapped",  # noqa: A002 - the name of the option
    **options: Unpack[OutputOptions],
) -> Report:
    """Put fresh LoRA pairs into a checkpoint, as `InternVLChatModel.wrap_llm_lora` does.

    `llm_r` and `backbone_r` are the ranks in language model and vision encoder; at least one must be
    given. lora_A has the values that PEFT gives it after `torch.manual_seed(seed)`, lora_B is
    zero; both have the dtype of their weight. `format` "wrapped" writes a whole checkpoint as
    InternVL's trainer saves and loads it (custom layout only; alpha is 2 r there, dropout 0.05),
    "peft" an adapter folder. Alphas default to 2 r. Further keywords are those of
    `streamshard.OutputOptions`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    started, chosen = time.perf_counter(), Options.of(options)
    ranks, alphas = _ranks(llm_r, llm_alpha, backbone_r, backbone_alpha)
    _check_options(format, ranks, alphas, dropout, seed)
    source = Model(with_bare_names(open_checkpoint(base)))
    note(*source.checkpoint.warnings)
    check_base(source.tensors, source.config, source.where, goal="wrapped")
    target = check_places(output, [source.path], overwrite=chosen.may_exist)
    layout = source.layout
    if layout is None:
        raise InputError(
            f"{source.where}: is of neither the custom nor the HF layout: it has no "
            "tensors of an InternVL vision encoder or projector."
        )
    given = source.given(layout)
    tensors: dict[str, Lazy] = {name: source.tensors[own] for name, own in given.items()}
    if source.relative is not None:
        raise InputError(
            f"{source.where}: is of {source.relative}, a relative of InternVL, whose classes InternVL's "
            "trainer does not know: wrap the model with peft."
        )
    dims = source.dims
    source.check()
    source.check_described()
    check_complete(tensors, dims, layout)
    targets = target_modules(tensors, dims, layout, ranks)
    pairs = initial_pairs(tensors, {target.module: target.r for target in targets}, seed)
    wraps = format == "wrapped"
    facts = {
        "base": str(source.path),
        "format": format,
        "pairs": len(pairs),
        "r": {part: ranks.get(part) for part in PARTS},
        "lora_alpha": {part: alphas.get(part) for part in PARTS},
        "seed": seed,
        "trainable": _trainable(tensors, pairs, dims, layout, ranks if wraps else ["model"]),
    }
    note(*_warnings(tensors, dims, ranks, wraps=wraps))
    choices = {
        "format": format,
        "seed": seed,
        "dropout": dropout,
        "llm_r": llm_r,
        "llm_alpha": llm_alpha,
        "backbone_r": backbone_r,
        "backbone_alpha": backbone_alpha,
    }
    if wraps:
        flagged = _wrapped_config(source, layout, ranks)
        note_left_behind(source.checkpoint.side_files, [source.path])
        embedding, _ = source.embedding_and_head
        rows = None if embedding is None else source.tensors[embedding].rows
        note_beyond(source.checkpoint.side_files, rows, source.tokenizer)
        named = wrap(tensors, pairs, [PARTS[part]["custom"] for part in ranks])
        files_of = source.checkpoint.shard_of
        job = Job(
            command="wrap-lora",
            output=target,
            started=started,
            tensors={name: tensor for name, (tensor, _) in named.items()},
            layout=layout,
            shard_of={name: files_of(given[beside]) for name, (_, beside) in named.items()},
            metadata=source.checkpoint.metadata,
            files={
                **source.checkpoint.side_files,
                MODEL_CONFIG_NAME: config_bytes(flagged, chosen.dtype),
            },
            l2_from=None,
            facts=facts,
            choices=choices,
        )
        return run(job, chosen)
    if chosen.max_shard_size is not None:
        raise UsageError("--max-shard-size: an adapter is always one file.")
    part_of = {m: next(p for p in ranks if m.startswith(PARTS[p][layout])) for m in pairs}
    live = {m: in_model(f"{m}.weight", layout).removesuffix(".weight") for m in pairs}
    adapter = {
        adapter_key(live[module], factor): tensor
        for module, pair in pairs.items()
        for factor, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    config = adapter_config(
        {live[module]: ranks[part] for module, part in part_of.items()},
        {live[module]: alphas[part] for module, part in part_of.items()},
        targets=[end for part in ranks for end in target_ends(dims.family, layout, part)],
        task_type=TASK_TYPES[layout],
        base=known_as(str(source.path)),
        dropout=UPSTREAM_DROPOUT if dropout is None else dropout,
    )
    job = Job(
        command="wrap-lora",
        output=target,
        started=started,
        tensors=adapter,
        layout=layout_of(adapter),
        shard_of=dict.fromkeys(adapter, ADAPTER_NAME),
        metadata={},
        files={ADAPTER_CONFIG_NAME: config_bytes(config, chosen.dtype)},
        weights_name=ADAPTER_NAME,
        l2_from=None,
        facts=facts,
        choices=choices,
    )
    return run(job, chosen)


def _ranks(
    llm_r: int | None,
    llm_alpha: float | None,
    backbone_r: int | None,
    backbone_alpha: float | None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of every part that is to be wrapped."""
    asked = {
        "vision_model": ("backbone", backbone_r, backbone_alpha),
        "language_model": ("llm", llm_r, llm_alpha),
    }
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for part, (option, r, alpha) in asked.items():
        if r is not None and not 1 <= r <= MAX_RANK:
            raise UsageError(f"--{option}-r is {r}; a rank from 1 to {MAX_RANK:,} was expected.")
        if r is None and alpha is not None:
            raise UsageError(f"--{option}-alpha needs --{option}-r.")
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            raise UsageError(f"--{option}-alpha is {alpha}; a number above 0 was expected.")
        if r is not None:
            ranks[part] = r
            alphas[part] = upstream_alpha(r) if alpha is None else alpha
    if not ranks:
        raise UsageError("nothing to wrap: give --llm-r, --backbone-r or both.")
    return ranks, alphas


def _check_options(
    form: str,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    dropout: float | None,
    seed: int,
) -> None:
    if form not in ("wrapped", "peft"):
        raise UsageError(f"--format is {form!r}; wrapped or peft can be chosen.")
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"--seed is {seed}; 0 to {MAX_SEED:,} can be chosen.")
    if dropout is not None and not 0 <= dropout < 1:
        raise UsageError(f"--dropout is {dropout}; a number from 0 to below 1 was expected.")
    if form == "peft":
        return
    other = [part for part, alpha in alphas.items() if alpha != upstream_alpha(ranks[part])]
    if other:
        raise UsageError(
            f"alpha of {listed(other)} is not twice the rank: a wrapped checkpoint stores no alpha, "
            "and InternVLChatModel takes 2 r whenever it loads one. Leave --llm-alpha and "
            "--backbone-alpha out, or write an adapter (--format peft), which stores it."
        )
    if dropout not in (None, UPSTREAM_DROPOUT):
        raise UsageError(
            f"--dropout is {dropout}, but a wrapped checkpoint stores none, and InternVLChatModel "
            f"takes {UPSTREAM_DROPOUT}. Leave it out, or write an adapter (--format peft)."
        )


def _wrapped_config(source: Model, layout: Layout, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The base's config with the ranks, by which InternVLChatModel knows that it must wrap."""
    where = source.where
    if layout != "custom":
        raise InputError(
            f"{where}: is of the HF layout, but the trainer that loads wrapped checkpoints knows "
            "only the custom layout. Convert it with `hf2custom`, or write an adapter (--format peft)."
        )
    if source.config is None:
        raise InputError(
            f"{where}: has no config.json, which must say that the checkpoint is wrapped. Give the "
            "whole folder."
        )
    return {
        **source.config,
        **flags_of(ranks),
    }


def _trainable(
    tensors: Mapping[str, Lazy],
    pairs: Mapping[str, tuple[Lazy, Lazy]],
    dims: Dims,
    layout: Layout,
    parts: Iterable[str],
) -> dict[str, Any]:
    """Parameters of each part as `PeftModel.get_nb_trainable_parameters` counts them."""
    counts = {}
    for part in parts:
        prefix = beginning(part, layout)
        new = sum(
            math.prod(factor.shape)
            for module, pair in pairs.items()
            if module.startswith(prefix)
            for factor in pair
        )
        total = new + parameters(tensors, dims, layout, prefix)
        counts[part] = {"trainable": new, "all": total, "percent": 100 * new / total}
    return counts


def _warnings(
    tensors: Mapping[str, Lazy], dims: Dims, ranks: Mapping[str, int], *, wraps: bool
) -> list[str]:
    found = []
    if "language_model" in ranks and wraps and dims.family not in UPSTREAM:
        found.append(
            f"InternVLChatModel.wrap_llm_lora does not know {FAMILIES[dims.family].architecture}: "
            "to load this checkpoint, wrap the model with streamshard.wrap_llm_lora first"
        )
    experts = [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]
    if "language_model" in ranks and experts:
        found.append(
            f"the experts are packed into tensors such as {listed(experts, 1)}, which are no modules: "
            "of the language model only the attention gets pairs"
        )
    return found
