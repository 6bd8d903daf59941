"""Synthetic InternVL checkpoints and LoRA adapters with true names, shapes and configs.

Nothing is downloaded and nothing large is held in memory: values are keyed slices of one random
block, streamed to disk. A tensor's bytes depend on its name, the seed and the dtype, not on the
sharding. `python tools/make_checkpoint.py --help` says what can be asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import math
import re
import shutil
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from presets import (
    LAYOUTS,
    PRESETS,
    Linear,
    Preset,
    Shape,
    added_tokens,
    llm_linears,
    model_config,
    model_type,
    tensor_shapes,
    vision_layer_prefix,
    vision_linears,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["PRESETS", "Preset", "Written", "tensor_shapes", "write_adapter", "write_checkpoint"]

TARGETS = ("llm", "vision", "all")
BLOCK_ELEMENTS = 1 << 21
CHUNK_ELEMENTS = 1 << 19
"""A tensor is made of chunks of so many elements, each a slice of the block of random values."""


# --- values ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype that files can have; `flips` marks the sign and mantissa bits in eight bytes."""

    header: str
    torch: str
    width: int
    flips: int


DTYPES = {
    "bf16": Dtype("BF16", "bfloat16", 2, 0x801F_801F_801F_801F),
    "fp16": Dtype("F16", "float16", 2, 0x80FF_80FF_80FF_80FF),
    "fp32": Dtype("F32", "float32", 4, 0x801F_FFFF_801F_FFFF),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write: `mean + scale * x`, x normal, or uniform in (-1, 1)."""

    name: str
    key: str
    """What the values depend on: equal in all spellings of the name."""
    shape: Shape
    uniform: bool = False
    mean: float = 0.0
    scale: float = 0.02

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def _encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round fp32 values to nearest even in `dtype`; bf16, unknown to numpy, as 16-bit integers."""
    if dtype == "fp32":
        return values
    if dtype == "fp16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


@functools.cache
def _block(dtype: str, scale: float, *, uniform: bool) -> NDArray[np.uint64]:
    """Draw the block of values that all tensors are cut from, viewed as eight-byte words."""
    rng = np.random.default_rng(0)
    if uniform:
        # Short of one, so that no flipped mantissa leaves (-1, 1).
        values = rng.random(BLOCK_ELEMENTS, np.float32) * np.float32(2) - np.float32(1)
        np.clip(values, -1 + 2**-23, 1 - 2**-23, out=values)
    else:
        values = rng.standard_normal(BLOCK_ELEMENTS, np.float32)
    return _encode(values * np.float32(scale), dtype).view(np.uint64)


def _noise(
    dtype: str, scale: float, key: str, elements: int, *, uniform: bool
) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of random values in chunks; each is overwritten by the next.

    The key of a chunk chooses a place in the block, and which signs and mantissa bits to flip
    in every eight bytes. Flips keep the exponent, and so the scale, and all values stay finite.
    """
    block, flips = _block(dtype, scale, uniform=uniform), DTYPES[dtype].flips
    width = DTYPES[dtype].width
    words = np.empty(CHUNK_ELEMENTS * width // 8, np.uint64)
    for index, start in enumerate(range(0, elements, CHUNK_ELEMENTS)):
        nbytes = min(CHUNK_ELEMENTS, elements - start) * width
        count = -(-nbytes // 8)
        digest = hashlib.blake2b(f"{key}\0{index}".encode(), digest_size=16).digest()
        place, bits = struct.unpack("<QQ", digest)
        place %= block.size - words.size
        np.bitwise_xor(block[place : place + count], np.uint64(bits & flips), out=words[:count])
        yield words[:count].view(np.uint8)[:nbytes]


def tensor_chunks(tensor: Tensor, dtype: str, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor in chunks of 1 to 2 MB; each is overwritten by the next."""
    key = f"{seed}\0{tensor.key}"
    if not (tensor.uniform or tensor.mean):
        yield from _noise(dtype, tensor.scale, key, tensor.elements, uniform=False)
        return
    mean, scale = np.float32(tensor.mean), np.float32(tensor.scale)
    for chunk in _noise("fp32", 1.0, key, tensor.elements, uniform=tensor.uniform):
        yield _encode(chunk.view(np.float32) * scale + mean, dtype).view(np.uint8)


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer has written; `nbytes` counts tensor data without headers."""

    tensors: int
    parameters: int
    nbytes: int
    files: tuple[Path, ...]


def parse_size(size: str | int) -> int:
    """Return the bytes of a shard size, in decimal units.

    >>> parse_size("1.5GB")
    1500000000
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", size, re.IGNORECASE)
    if match is None:
        msg = f"{size!r} is not a size; write it like 5GB, 500MB or 1000000"
        raise ValueError(msg)
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _write_safetensors(
    path: Path, tensors: Iterable[Tensor], dtype: str, seed: int, tell: Callable[[int, str], object]
) -> None:
    """Write a file, byte for byte as `safetensors.torch.save_file` orders, pads and labels it."""
    # The reference writer sorts by dtype, then by name; here a file has only one dtype.
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.elements * DTYPES[dtype].width
        header[tensor.name] = {
            "dtype": DTYPES[dtype].header,
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            for chunk in tensor_chunks(tensor, dtype, seed):
                file.write(chunk.data)
                tell(chunk.nbytes, tensor.name)


def _write_bin(
    path: Path, tensors: Iterable[Tensor], dtype: str, seed: int, tell: Callable[[int, str], object]
) -> None:
    """Pickle the tensors as a state dict; torch needs all of them in memory."""
    import torch

    torch_dtype = getattr(torch, DTYPES[dtype].torch)
    state = {}
    for tensor in tensors:
        data = bytearray().join(chunk.tobytes() for chunk in tensor_chunks(tensor, dtype, seed))
        state[tensor.name] = torch.frombuffer(data, dtype=torch_dtype).reshape(tensor.shape)
        tell(len(data), tensor.name)
    torch.save(state, path)


def _split(tensors: Sequence[Tensor], width: int, max_shard_size: int) -> list[list[Tensor]]:
    """Fill shards in the given order, cut where huggingface_hub's own splitter cuts."""
    shards: list[list[Tensor]] = []
    current: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        nbytes = tensor.elements * width
        if nbytes > max_shard_size:  # a shard of its own; the current one stays open
            shards.append([tensor])
            continue
        if filled + nbytes > max_shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += nbytes
    return [*shards, current] if current else shards


def _write_shards(
    folder: Path,
    tensors: Sequence[Tensor],
    *,
    dtype: str,
    seed: int,
    max_shard_size: int,
    progress: Callable[[int, str], object],
) -> Written:
    width = DTYPES[dtype].width
    shards = _split(tensors, width, max_shard_size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    stop = threading.Event()

    def tell(nbytes: int, name: str) -> None:
        if stop.is_set():
            raise InterruptedError
        progress(nbytes, name)

    pool = ThreadPoolExecutor(max_workers=2)  # nearly all the time is spent in the kernel
    try:
        jobs = [
            pool.submit(_write_safetensors, folder / name, shard, dtype, seed, tell)
            for name, shard in zip(names, shards, strict=True)
        ]
        for job in jobs:
            job.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    parameters = sum(tensor.elements for tensor in tensors)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": parameters, "total_size": parameters * width},
            "weight_map": {
                tensor.name: name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard
            },
        }
        _write_json(folder / "model.safetensors.index.json", index)
    files = tuple(folder / name for name in names)
    return Written(len(tensors), parameters, parameters * width, files)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """A folder for the block to fill, which is empty again, or gone, if that does not succeed.

    One that holds files is refused, as a stray shard would be loaded.
    """
    folder = Path(path).expanduser()
    with removed_unless_done(folder):
        if any(folder.iterdir()):
            msg = f"{folder}: is not empty. Choose a new folder, or remove that one first."
            raise FileExistsError(msg)
        yield folder


@contextlib.contextmanager
def removed_unless_done(folder: Path) -> Iterator[None]:
    """Make a folder, if there is none; what the block puts into it goes if that does not succeed."""
    before = set(folder.iterdir()) if folder.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if before is None:
            shutil.rmtree(folder, ignore_errors=True)
        for new in set(folder.iterdir()).difference(before or ()) if folder.exists() else ():
            if new.is_dir():
                shutil.rmtree(new, ignore_errors=True)
            else:
                new.unlink(missing_ok=True)
        raise


# --- side files -----------------------------------------------------------------------------------

_PLACEHOLDER = '''\
"""Placeholder for remote code.

A real checkpoint in the custom layout carries {name} here. This synthetic checkpoint only needs a
file of that name, so that tools can be seen to carry it along. It defines nothing.
"""
'''
_REMOTE_CODE = (
    "configuration_intern_vit",
    "configuration_internvl_chat",
    "conversation",
    "modeling_intern_vit",
    "modeling_internvl_chat",
)
_LLM_REMOTE_CODE = {
    "internlm2": "configuration modeling tokenization",
    "internlm3": "configuration modeling tokenization",
    "phi3": "configuration modeling",
}
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}<IMG_CONTEXT>
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


def _byte_tokens() -> list[str]:
    """Return the 256 letters in which byte-level BPE vocabularies spell bytes.

    Printable Latin-1 bytes stand for themselves, the others for the code points from 256 on.
    """
    spare = iter(range(256, 512))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _write_tokenizer(folder: Path, preset: Preset) -> None:
    """Write a byte-level tokenizer with InternVL's added tokens, in the files of Qwen models."""
    tokens = added_tokens(preset)
    pad = "<|endoftext|>" if "<|endoftext|>" in tokens else "</img>"
    eos = "<|im_end|>" if "<|im_end|>" in tokens else "</img>"
    decoder = {
        str(token_id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, token_id in tokens.items()
    }
    vocab = {token: i for i, token in enumerate(_byte_tokens())}
    special = {"additional_special_tokens": list(tokens), "eos_token": eos, "pad_token": pad}
    _write_json(folder / "added_tokens.json", tokens)
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            "errors": "replace",
            "model_max_length": preset.max_positions,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8", newline="\n")


def _write_processor(folder: Path, preset: Preset, layout: str) -> None:
    size = preset.vision.image_size
    common: dict[str, Any] = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    if layout == "custom":
        specific: dict[str, Any] = {
            "crop_size": size,
            "do_center_crop": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": size,
        }
    else:
        specific = {
            "crop_to_patches": False,
            "do_convert_rgb": True,
            "do_rescale": True,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": 12,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "rescale_factor": 1 / 255,
            "size": {"height": size, "width": size},
        }
        (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8", newline="\n")
    _write_json(folder / "preprocessor_config.json", common | specific)


def _write_side_files(folder: Path, preset: Preset, layout: str, dtype: str, *, tied: bool) -> None:
    config = model_config(preset, layout, tied=tied, torch_dtype=DTYPES[dtype].torch)
    _write_json(folder / "config.json", config)
    generation: dict[str, Any] = {"_from_model_config": True, "transformers_version": "4.37.2"}
    if layout == "hf":
        generation = {
            "bos_token_id": preset.bos,
            "eos_token_id": preset.eos_chat,
            "pad_token_id": preset.pad,
            "transformers_version": "4.52.4",
        }
    _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(folder, preset)
    _write_processor(folder, preset, layout)
    if layout == "custom":
        kind = model_type(preset, layout)
        modules = [f"{stem}_{kind}" for stem in _LLM_REMOTE_CODE.get(kind, "").split()]
        for module in (*_REMOTE_CODE, *modules):
            text = _PLACEHOLDER.format(name=f"{module}.py")
            (folder / f"{module}.py").write_text(text, encoding="utf-8", newline="\n")


# --- checkpoints ----------------------------------------------------------------------------------


def _weight(name: str, key: str, shape: Shape) -> Tensor:
    """Describe a weight with values in the range that a trained model has."""
    if len(shape) == 1 and name.endswith(".weight"):  # linear weights have two dimensions
        return Tensor(name, key, shape, mean=1.0, scale=0.05)
    if name.endswith((".ls1", ".ls2", ".lambda_1", ".lambda_2")):
        return Tensor(name, key, shape, mean=0.1, scale=0.01)
    return Tensor(name, key, shape)


def _resolve(preset: Preset | str, layout: str, dtype: str) -> Preset:
    for value, choices in ((layout, LAYOUTS), (dtype, tuple(DTYPES))):
        if value not in choices:
            msg = f"{value!r} is unknown; choose one of {', '.join(choices)}"
            raise ValueError(msg)
    if isinstance(preset, Preset):
        return preset
    lower = {name.lower(): found for name, found in PRESETS.items()}
    if preset.lower() not in lower:
        near = difflib.get_close_matches(preset.lower(), lower, n=2)
        like = f", such as {' and '.join(lower[name].name for name in near)}" if near else ""
        msg = f"preset {preset!r} is unknown; --list shows all of them{like}"
        raise ValueError(msg)
    return lower[preset.lower()]


def _ignored(*_: object) -> None:
    """What is told, where nobody asked."""


def write_checkpoint(
    path: str | Path,
    preset: Preset | str,
    *,
    layout: str = "hf",
    seed: int = 0,
    dtype: str = "bf16",
    max_shard_size: str | int = "5GB",
    tied: bool = False,
    spelling: str = "flat",
    on_total: Callable[[int], object] = _ignored,
    progress: Callable[[int, str], object] = _ignored,
) -> Written:
    """Write a checkpoint folder: weights, index, configs, tokenizer and processor files.

    `path` is a folder that does not exist or is empty, otherwise FileExistsError; `preset` may be
    a name; `layout` is `custom` or `hf`. `seed` (any int), `dtype` (`bf16`, `fp16` or `fp32`, of
    all tensors) and a tensor's name determine its bytes. `max_shard_size` is in bytes, or text
    such as `5GB` (decimal); a single shard becomes `model.safetensors`.

    Only for hf: `tied` leaves out the head and sets `tie_word_embeddings` at both levels of the
    config; `spelling` (see `presets.SPELLINGS`) changes the names, never the values.

    `on_total` is told the bytes of all tensors, and `progress` those of each piece, and its tensor.
    If it does not succeed, nothing of it stays.
    """
    preset = _resolve(preset, layout, dtype)
    shapes = tensor_shapes(preset, layout, tied=tied, spelling=spelling)
    flat = tensor_shapes(preset, layout, tied=tied)
    tensors = [
        _weight(name, key, shape) for (name, shape), key in zip(shapes.items(), flat, strict=True)
    ]
    max_shard_size = parse_size(max_shard_size)
    with _new_folder(path) as folder:
        on_total(sum(tensor.elements for tensor in tensors) * DTYPES[dtype].width)
        _write_side_files(folder, preset, layout, dtype, tied=tied)
        return _write_shards(
            folder,
            tensors,
            dtype=dtype,
            seed=seed,
            max_shard_size=max_shard_size,
            progress=progress,
        )


# --- adapters -------------------------------------------------------------------------------------


def _adapted(preset: Preset, layout: str, targets: str) -> list[tuple[str, list[Linear]]]:
    """Per group of layers: their prefix without the number, and the adapted modules of one."""
    # A loaded hf model has nested names, whatever its file has, and packed experts.
    outer = "model." if layout == "hf" else ""
    llm = "model.language_model.layers" if layout == "hf" else "language_model.model.layers"
    vision = outer + vision_layer_prefix(layout)
    groups = []
    if targets in {"vision", "all"}:
        groups.append((vision, vision_linears(preset, layout)))
    if targets in {"llm", "all"}:
        groups.append((llm, llm_linears(preset, layout, packed=layout == "hf")))
    return groups


def _adapter_tensors(
    preset: Preset, groups: Sequence[tuple[str, list[Linear]]], r: int
) -> Iterator[Tensor]:
    for prefix, linears in groups:
        layers = preset.layers if "language_model" in prefix else preset.vision.layers
        for i in range(layers):
            for linear in linears:
                module = linear.name
                if linear.experts:
                    # PEFT nests the wrappers of the two parameters, the first one innermost.
                    inner = ".base_layer" if module.endswith("gate_up_proj") else ""
                    module = f"mlp.experts{inner}"
                stem = f"base_model.model.{prefix}.{i}.{module}"
                rank, bound = r * max(linear.experts, 1), linear.in_features**-0.5
                a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
                yield Tensor(a, a, (rank, linear.in_features), uniform=True, scale=bound)
                yield Tensor(b, b, (linear.out_features, rank))


def _target_names(groups: Sequence[tuple[str, list[Linear]]]) -> tuple[list[str], list[str]]:
    """`target_modules` and `target_parameters`: suffixes that fit no module of another group."""
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    for _, linears in groups:
        for linear in linears:
            if linear.experts:
                parameters[linear.name] = None
            else:
                modules[re.sub(r"^mlp\.experts\.\d+\.", "", linear.name)] = None
    return list(modules), list(parameters)


def _adapter_config(
    modules: list[str],
    parameters: list[str],
    *,
    r: int,
    lora_alpha: float,
    use_rslora: bool,
    base_model_name: str,
) -> dict[str, Any]:
    """Every field that peft 0.21.2 writes; those that are not set here at their inert values."""
    unused = (
        "alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config",
        "exclude_modules", "kasa_config", "layer_replication", "layers_pattern",
        "layers_to_transform", "lora_ga_config", "megatron_config", "modules_to_save",
        "monteclora_config", "revision", "trainable_token_indices", "use_bdlora",
        "velora_config",
    )  # fmt: skip
    return dict.fromkeys(unused) | {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "ensure_weight_tying": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": lora_alpha,
        "lora_bias": False,
        "lora_dropout": 0.05 if not parameters else 0.0,  # PEFT has no dropout on parameters
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": r,
        "rank_pattern": {},
        "target_modules": modules,
        "target_parameters": parameters or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": use_rslora,
    }


def write_adapter(
    path: str | Path,
    preset: Preset | str,
    *,
    layout: str = "hf",
    r: int = 16,
    lora_alpha: float = 32,
    targets: str = "llm",
    dtype: str = "fp32",
    seed: int = 0,
    use_rslora: bool = False,
    base_model_name: str = "",
    bin: bool = False,  # noqa: A002 - the extension of the file
    on_total: Callable[[int], object] = _ignored,
    progress: Callable[[int, str], object] = _ignored,
) -> Written:
    """Write a PEFT adapter folder for a preset, with a nonzero `lora_B`.

    `lora_A` is uniform within 1/sqrt(in), `lora_B` normal with deviation 0.02. Every linear
    module of the targeted layers has a pair, routers excepted. Module names are those that a
    trainer sees: in the custom layout those of the file, with one module an expert; in the hf
    layout the nested names of a loaded model, with packed experts (`target_parameters`, A of
    shape (experts * r, in), B of shape (out, experts * r)).

    `path`, `preset`, `layout` and `seed` are as in `write_checkpoint`; `targets` are the language
    model (`llm`), the vision encoder (`vision`) or both (`all`); PEFT itself stores fp32. With
    `bin`, the tensors go to `adapter_model.bin`, which needs torch and memory for all of them.
    """
    preset = _resolve(preset, layout, dtype)
    if targets not in TARGETS:
        msg = f"targets {targets!r} are unknown; choose one of {', '.join(TARGETS)}"
        raise ValueError(msg)
    groups = _adapted(preset, layout, targets)
    modules, parameters = _target_names(groups)
    config = _adapter_config(
        modules,
        parameters,
        r=r,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        base_model_name=base_model_name,
    )
    tensors = list(_adapter_tensors(preset, groups, r))
    parameters_written = sum(tensor.elements for tensor in tensors)
    nbytes = parameters_written * DTYPES[dtype].width
    with _new_folder(path) as folder:
        on_total(nbytes)
        _write_json(folder / "adapter_config.json", config)
        file = folder / f"adapter_model.{'bin' if bin else 'safetensors'}"
        (_write_bin if bin else _write_safetensors)(file, tensors, dtype, seed, progress)
    return Written(len(tensors), parameters_written, nbytes, (file,))


def main() -> None:
    """Run the command line, and exit with the code of what happened."""
    from checkpoint_command import run

    run()


if __name__ == "__main__":
    sys.modules["make_checkpoint"] = sys.modules["__main__"]  # it is imported once
    main()
