"""`extract-lora`: the adapter inside a LoRA-wrapped training checkpoint, as a PEFT adapter folder.

The pairs are told by their names (`wrapped_names`); what else was trained shows in a comparison
with the model that the training started from. Nothing but such tensors is written, and nothing is
computed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Unpack

from streamshard.checkpoint.file_names import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from streamshard.checkpoint.folder import Checkpoint, open_checkpoint
from streamshard.checkpoint.header import total_nbytes
from streamshard.checkpoint.tokenizer import Content
from streamshard.commands.bare_names import with_bare_names
from streamshard.commands.identify import Model
from streamshard.commands.public import public
from streamshard.commands.training_checkpoint import Wrapped, read_wrapped
from streamshard.commands.whose_tokenizer import for_adapter
from streamshard.commands.written_config import config_bytes
from streamshard.disk.far import known_as
from streamshard.disk.paths import PathLike, input_path
from streamshard.engine.budget import workers_or_default
from streamshard.engine.fetching import fetch, stored
from streamshard.engine.job import Job, Options, OutputOptions
from streamshard.engine.output_path import check_places
from streamshard.engine.report import Report
from streamshard.engine.run import run
from streamshard.engine.workers import collect
from streamshard.errors import AdapterError, InputError, UsageError, listed, printable
from streamshard.internvl.detection import layout_of
from streamshard.internvl.families import Layout
from streamshard.internvl.lora_targets import TASK_TYPES, UPSTREAM_DROPOUT, upstream_alpha
from streamshard.internvl.spelling import flat_name, flat_names, in_model, is_qianfan
from streamshard.lora.saved_adapter import adapter_config, adapter_key, selection
from streamshard.lora.wrapped_names import Unwrapped
from streamshard.notes import note
from streamshard.tensor_names import PREFIX
from streamshard.tensors.comparing import equal_bytes
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.workspace import Workspace

__all__ = ["extract_lora"]


@public
def extract_lora(
    *,
    checkpoint: PathLike,
    output: PathLike | None = None,
    base: PathLike | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
    **options: Unpack[OutputOptions],
) -> Report:
    """Write the LoRA pairs of a wrapped training checkpoint as a PEFT adapter folder.

    With `base`, the model that the training started from, every other tensor is compared with it,
    by its bytes; modules that differ (the projector) go to the adapter as `modules_to_save`.
    Without, what may have been trained is named in a warning and left out. `alpha` is 2 r by
    default, as InternVL's trainer has it. `adapter_name` selects one of several adapters.
    Further keywords are those of `streamshard.OutputOptions`.

    Raises a `StreamshardError`; its class says what is wrong (`streamshard.errors`).
    """
    started, chosen = time.perf_counter(), Options.of(options)
    if chosen.max_shard_size is not None:
        raise UsageError("--max-shard-size: an adapter is always one file.")
    instead = "what can be extracted is in what a training with LoRA has saved: give that folder."
    read = read_wrapped(checkpoint, alpha=alpha, adapter_name=adapter_name, instead=instead)
    source, found, ranks = read.checkpoint, read.names, read.ranks
    where = printable(str(source.path))
    base = None if base is None else input_path(base, "the base")
    inputs = [source.path, *([] if base is None else [base])]
    target = check_places(output, inputs, overwrite=chosen.may_exist)
    Model(source).check_described(found.base)
    if base is None and not read.has_base:
        raise read.without_base()
    layout: Layout = layout_of(source.tensors) or "custom"
    own = None if base is None else _started_from(base, layout, where)
    weights_of: dict[str, Lazy] = {
        name: source.tensors[given] for name, given in found.base.items()
    }
    if own is not None and not read.has_base:  # by what it had when the training began
        weights_of = {**{n: own.tensors[g] for n, g in own.given(layout).items()}, **weights_of}
    _check_shapes(source, found, weights_of)
    tokenizer: dict[str, Content] = {}
    plain = flat_names(found.base, layout)
    trained = {flat_name(n) if layout == "hf" else n for n in found.saved}
    if own is None:
        note(*_left_out(plain, trained, found.depths, where))
    else:
        tokenizer = for_adapter(own.tokenizer, Model(source).tokenizer)
        trained |= _changed(read, plain, own, layout, chosen)
    modules = {
        flat_name(f"{m}.weight").removesuffix(".weight") if layout == "hf" else m: m for m in ranks
    }
    saved = _saved_modules(trained, modules, plain, where)
    in_memory = partial(in_model, layout=layout, qianfan=is_qianfan(source.tensors))
    live = {flat: in_memory(f"{flat}.weight").removesuffix(".weight") for flat in modules}
    live_ranks = {live[flat]: ranks[module] for flat, module in modules.items()}
    tensors: dict[str, Lazy] = {}
    for flat, module in modules.items():
        tensors[adapter_key(live[flat], "lora_A")] = source.tensors[found.pairs[module].A]
        tensors[adapter_key(live[flat], "lora_B")] = source.tensors[found.pairs[module].B]
    for name in plain:
        if any(name.startswith(f"{module}.") for module in saved):
            given_name = found.saved.get(plain[name], found.base[plain[name]])
            tensors[PREFIX + in_memory(name)] = source.tensors[given_name]
    names = plain if read.has_base else flat_names(weights_of, layout)
    weights = [in_memory(n).removesuffix(".weight") for n in names if n.endswith(".weight")]
    alphas = {
        m: float(upstream_alpha(r)) if alpha is None else alpha for m, r in live_ranks.items()
    }
    entries = [in_memory(f"{module}.weight").removesuffix(".weight") for module in saved]
    config = adapter_config(
        live_ranks,
        {m: int(value) if value == int(value) else value for m, value in alphas.items()},
        targets=selection(live_ranks, weights),
        task_type=TASK_TYPES[layout],
        base=None if base is None else known_as(str(base)),
        dropout=UPSTREAM_DROPOUT,
        saved=entries,
    )
    job = Job(
        command="extract-lora",
        output=target,
        started=started,
        tensors=tensors,
        layout=layout_of(tensors),
        shard_of=dict.fromkeys(tensors, ADAPTER_NAME),
        metadata={},
        files={ADAPTER_CONFIG_NAME: config_bytes(config, chosen.dtype), **tokenizer},
        weights_name=ADAPTER_NAME,
        l2_from=None,
        choices={"alpha": alpha, "adapter_name": adapter_name},
        facts={
            "checkpoint": str(source.path),
            "base": None if base is None else str(base),
            "pairs": len(ranks),
            "r": config["r"],
            "rank_pattern": config["rank_pattern"],
            "lora_alpha": config["lora_alpha"],
            "modules_to_save": entries,
        },
    )
    return run(job, chosen)


def _started_from(base: PathLike, layout: Layout, where: str) -> Model:
    """The model that a training started from; raises `InputError` if it is of the other layout."""
    own = Model(with_bare_names(open_checkpoint(base)))
    note(*own.checkpoint.warnings)
    if own.layout not in (None, layout):
        to = {"custom": "hf2custom", "hf": "custom2hf"}[layout]
        raise InputError(
            f"{own.where}: is of the {own.layout} layout, but {where} of the {layout} one: tensors are "
            f"compared by their bytes, so give it in the {layout} layout (`{to}` converts it)."
        )
    return own


def _check_shapes(source: Checkpoint, found: Unwrapped, weights_of: Mapping[str, Lazy]) -> None:
    """Raise `AdapterError` for a pair that does not fit its weight, or has none."""
    where = printable(str(source.path))
    for module, pair in found.pairs.items():
        A, B = source.tensors[pair.A], source.tensors[pair.B]
        weight = f"{module}.weight"
        if weight not in weights_of:
            raise AdapterError(
                f"{where}: '{printable(pair.A)}' has no weight beside it ('{printable(module)}.weight'); "
                "pairs of fused experts (target_parameters) cannot be extracted."
            )
        W = weights_of[weight]
        for name, factor in ((pair.A, A), (pair.B, B)):
            if factor.dtype not in FLOATS:
                raise AdapterError(
                    f"{where}: '{printable(name)}' is {factor.dtype}; one of {', '.join(FLOATS)} was "
                    "expected. Save the checkpoint again, without quantizing it."
                )
        rank = A.shape[0]
        if (B.shape, A.shape) != ((W.rows, rank), (rank, W.columns)) or len(W.shape) != 2:
            raise AdapterError(
                f"{where}: '{printable(pair.A)}' {list(A.shape)} and its lora_B {list(B.shape)} do "
                f"not fit '{printable(weight)}' {list(W.shape)}. The checkpoint is damaged."
            )


def _left_out(
    plain: Collection[str], trained: Collection[str], depths: Mapping[str, int], where: str
) -> list[str]:
    """A warning with what PEFT has not frozen, and training may have changed."""
    inside = tuple(f"{part}." if part else "" for part in depths)
    free = [name for name in plain if name not in trained and not name.startswith(inside)]
    if not free:
        return []
    counts = Counter(name.partition(".")[0] for name in free)
    parts = ", ".join(f"{part} ({count} tensors)" for part, count in counts.items())
    return [
        f"{where}: training may also have changed {parts}, which the adapter does not have. Give "
        "--base, the model that the training started from, to compare and keep what differs"
    ]


def _changed(
    read: Wrapped, plain: Mapping[str, str], own: Model, layout: Layout, chosen: Options
) -> set[str]:
    """Names of tensors that are not as in the model that the training started from, pairs aside."""
    source, found = read.checkpoint, read.names
    mine: dict[str, Lazy] = {name: source.tensors[found.base[n]] for name, n in plain.items()}
    given = {name: own.tensors[n] for name, n in own.given(layout).items()}
    if not read.has_base:
        given = {name: tensor for name, tensor in given.items() if name in mine}
    if not chosen.dry_run:
        both = (*mine.values(), *given.values())
        fetch({one.path for tensor in both for one in stored(tensor)}, chosen.on_step)
    return _differing(mine, given, (printable(str(source.path)), own.where), chosen)


def _differing(
    mine: Mapping[str, Lazy], theirs: Mapping[str, Lazy], where: tuple[str, str], chosen: Options
) -> set[str]:
    """Names of tensors whose bytes are not those of the base, which must have the same names."""
    only = sorted(set(mine) - set(theirs)) or sorted(set(theirs) - set(mine))
    if only:
        lacking = where[1] if only[0] in mine else where[0]
        raise InputError(
            f"{lacking}: lacks {listed(only, 3)}, which the other one has. Is {where[1]} the model that "
            "the training started from, in the same layout?"
        )
    for name, tensor in mine.items():
        other = theirs[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            raise InputError(
                f"{where[0]}: '{printable(name)}' is {tensor.dtype} {list(tensor.shape)}, but "
                f"{other.dtype} {list(other.shape)} in {where[1]}. Give the model that the training "
                "started from, in the dtype of the training; an adapter cannot change a shape."
            )
    lock = threading.Lock()

    def is_equal(name: str, work: Workspace) -> bool:
        same = equal_bytes(mine[name], theirs[name], work)
        if chosen.progress is not None and chosen.on_step is not None:
            with lock:
                chosen.progress(mine[name].nbytes, name)
        return same

    if chosen.on_step is not None:
        chosen.on_step("comparing", total_nbytes(mine), 0)
    equal = collect(mine, is_equal, workers_or_default(chosen.workers))
    return {name for name, same in zip(mine, equal, strict=True) if not same}


def _saved_modules(
    trained: Collection[str], adapted: Collection[str], plain: Iterable[str], where: str
) -> list[str]:
    """The modules that the trained tensors are of, as PEFT can save and load them whole."""
    names = set(plain)
    bad = [
        name
        for name in sorted(trained)
        if name.rpartition(".")[2] not in ("weight", "bias") or name.rpartition(".")[0] in adapted
    ]
    if bad:
        raise AdapterError(
            f"{where}: {len(bad)} tensors differ from the base and cannot be part of an adapter: "
            f"{listed(bad)}. They are weights under a LoRA pair, or parameters that are no modules of "
            "their own. Is this the base that the training started from? If it is, merge the "
            "checkpoint instead: `merge-lora CHECKPOINT`."
        )
    # A numbered module is one of a Sequential, as mlp1.1, which goes as a whole.
    owners = {name.rpartition(".")[0] for name in trained if name in names}
    return sorted({o.rpartition(".")[0] if o.rpartition(".")[2].isdecimal() else o for o in owners})
