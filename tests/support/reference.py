"""What the tests compare with: files made and read by safetensors, and exact merges in fp64.

Nothing here uses the package. Rounding is done by scaling to whole numbers, which the package,
working on bits, does not; `tests/tensors/test_rounding.py` checks it against fractions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Tensors: TypeAlias = dict[str, torch.Tensor]
Float64: TypeAlias = npt.NDArray[np.float64]

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SPELLED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Significant binary digits, and the exponent of the smallest normal number.
FORMATS = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126)}
INDEX = "model.safetensors.index.json"

PLAIN_CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.05,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "target_modules": None,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


# --- writing and reading --------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    *shards: Tensors,
    config: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a checkpoint folder: one shard without an index, several with one."""
    folder.mkdir(parents=True)
    config = {"model_type": "internvl_chat"} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata or {"format": "pt"})
        return folder
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata or {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    save_index(folder, weight_map)
    return folder


def save_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def save_adapter(folder: Path, tensors: Tensors, *, pickled: bool = False, **config: Any) -> Path:
    """Write a PEFT adapter folder; `config` is laid over that of a plain adapter."""
    folder.mkdir(parents=True)
    content = PLAIN_CONFIG | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def read(folder: Path) -> Tensors:
    """All weights of a folder, through its index if it has one."""
    index = folder / INDEX
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(weight_map.values())}
    assert sum(map(len, files.values())) == len(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor as safetensors stores them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def digests(folder: Path) -> dict[str, str]:
    """Path to content of everything below a folder, links and empty folders included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def double(tensor: torch.Tensor) -> Float64:
    return tensor.to(torch.float64).numpy()


def normal(shape: Sequence[int], std: float, *, seed: int, dtype: str = "F32") -> torch.Tensor:
    """Normal values, drawn in fp32 and rounded to `dtype` by torch."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator) * std).to(TORCH[dtype])


# --- exact arithmetic -----------------------------------------------------------------------------


def round_once(values: Float64, dtype: str) -> Float64:
    """The nearest elements of `dtype`, ties to even, infinite beyond its range."""
    digits, lowest = FORMATS[dtype]
    _, exponents = np.frexp(values)
    # The place of the last digit that the format keeps; fixed among the subnormal numbers.
    places = np.maximum(exponents, lowest + 1) - digits
    rounded = np.ldexp(np.rint(np.ldexp(values, -places)), places)
    largest = np.ldexp(2.0 - 2.0 ** (1 - digits), 1 - lowest)
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, values), rounded)


def step(values: Float64, dtype: str) -> Float64:
    """The distance of neighbours in `dtype` at the magnitude of `values`."""
    digits, lowest = FORMATS[dtype]
    _, exponents = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponents, lowest + 1) - digits)


class Update(NamedTuple):
    """`scale * B @ A`, to be added to the base tensor `home`."""

    home: str
    scale: float
    A: Float64
    B: Float64


def in_base(module: str) -> str:
    """The tensor of a module, for adapters that name modules as the base does."""
    return f"{module}.weight"


def updates_of(
    folder: Path, *, home: Callable[[str], str] = in_base, weight: float = 1.0
) -> list[Update]:
    """What an adapter without patterns adds to which tensor."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    if (folder / "adapter_model.safetensors").exists():
        tensors = load_file(folder / "adapter_model.safetensors")
    else:
        tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    found = []
    for key, A in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match is not None:
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            scale = weight * config["lora_alpha"] / root
            found.append(Update(home(match[1]), scale, double(A), double(B)))
    assert len(found) * 2 == len(tensors)
    return found


def of_experts(update: Update, base: Tensors) -> list[Update]:
    """What a pair on a fused parameter means for a base that has experts fused, or one by one.

    A has the rows of one expert after the other; in B the columns of one rank stand together. peft
    nests the wrappers of the two parameters, `gate_up_proj` innermost.
    """
    match = re.fullmatch(r"(.+\.experts)(\.base_layer)?\.weight", update.home)
    if match is None:
        return [update]
    stem, name = match[1], "gate_up_proj" if match[2] else "down_proj"
    single = name.replace("gate_up", "gate")
    fused = base.get(f"{stem}.{name}")
    count = sum(n.startswith(stem) and n.endswith(f".{single}.weight") for n in base)
    count = count if fused is None else len(fused)
    A = update.A.reshape(count, -1, update.A.shape[1])
    B = update.B.reshape(len(update.B), -1, count).transpose(2, 0, 1)
    if fused is not None:
        up, down = (base[f"{stem}.{n}"].shape for n in ("gate_up_proj", "down_proj"))
        if up[2] == 2 * down[1]:  # stored (in, out)
            A, B = B.transpose(0, 2, 1), A.transpose(0, 2, 1)
        return [Update(f"{stem}.{name}", update.scale, A, B)]
    parts = ("gate_proj", "up_proj") if match[2] else ("down_proj",)
    return [
        Update(f"{stem}.{e}.{part}.weight", update.scale, A[e], rows)
        for e in range(count)
        for part, rows in zip(parts, np.split(B[e], len(parts)), strict=True)
    ]


def exactly_merged(base: Tensors, updates: Sequence[Update]) -> dict[str, Float64]:
    """The tensors that change, before rounding."""
    sums: dict[str, Float64] = {}
    for home, scale, A, B in updates:
        sums[home] = sums.get(home, double(base[home])) + scale * (B @ A)
    return sums


def assert_merged(
    written: Tensors,
    base: Tensors,
    updates: Sequence[Update],
    *,
    equal: float = 0.9999,
    dtype: str | None = None,
) -> None:
    """Untouched tensors are those of the base, the others correctly rounded all but rarely.

    Of all merged elements at least the fraction `equal` must be that of the reference, and none
    may be further from it than one step of the dtype at the scale of W.
    """
    assert set(written) == set(base)
    exact = exactly_merged(base, updates)
    assert exact
    elements = different = 0
    for name, tensor in base.items():
        if name not in exact:
            assert same_tensor(written[name], tensor if dtype is None else tensor.to(TORCH[dtype]))
            continue
        spelled = dtype or SPELLED[tensor.dtype]
        assert SPELLED[written[name].dtype] == spelled
        result, expected = double(written[name]), round_once(exact[name], spelled)
        assert result.shape == expected.shape
        scale = np.maximum(np.abs(double(tensor)), np.abs(expected))
        assert (np.abs(result - expected) <= step(scale, spelled)).all(), name
        elements += result.size
        different += int((result != expected).sum())
    assert different <= (1 - equal) * elements, f"{different} of {elements} differ"
    # The reference itself must say that there was something to do.
    assert any((round_once(v, "F32") != double(base[n])).any() for n, v in exact.items())
