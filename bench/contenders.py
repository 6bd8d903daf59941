"""What `speed.py` measures: the programs beside streamshard, and the inputs that all of them get."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["CASES", "Contender", "contenders"]

ROOT = Path(__file__).resolve().parent.parent
STREAMSHARD = [sys.executable, "-m", "streamshard"]
CASES = ("copies", "ranks", "dora", "wrapped", "two", "convert", "l2", "shards", "many", "peft")


@dataclass(frozen=True)
class Contender:
    """A program that writes a folder; `source` is what it reads, `synced` waits for the disk after it."""

    name: str
    command: Sequence[str]
    source: Path
    synced: bool = False
    slow: bool = False
    """Whether it is run once only."""


# The disk's limit: reads through the page cache, writes around it, waits for the disk.
COPY = """
import mmap, os, sys, threading
from pathlib import Path
source, target = map(Path, sys.argv[1:])
STEP, ALIGNED = 1 << 20, 4096
target.mkdir()
for path in sorted(source.iterdir()):
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    out = os.open(target / path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    os.ftruncate(out, size)
    if size:
        os.posix_fallocate(out, 0, size)
    around = os.open(target / path.name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
    steps, lock = iter(range(0, size, STEP)), threading.Lock()
    def copy():
        memory = memoryview(mmap.mmap(-1, STEP))
        while True:
            with lock:
                at = next(steps, None)
            if at is None:
                return
            count = min(STEP, size - at)
            done, whole = 0, count // ALIGNED * ALIGNED
            while done < count:
                done += os.preadv(fd, [memory[done:count]], at + done)
            if whole:
                os.pwrite(around, memory[:whole], at)
            if whole < count:
                os.pwrite(out, memory[whole:count], at + whole)
    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    os.fsync(out)
    for one in (fd, out, around): os.close(one)
"""

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base, adapter, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""

# What other tools do: load a shard, merge into its tensors, save it.
SHARDS = """
import json, shutil, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
base, adapter, output = map(Path, sys.argv[1:])
output.mkdir()
config = json.loads((adapter / "adapter_config.json").read_text())
scale = config["lora_alpha"] / config["r"]
factors = load_file(adapter / "adapter_model.safetensors")
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
merged = 0
for path in sorted(base.iterdir()):
    if path.suffix != ".safetensors":
        shutil.copy2(path, output)
        continue
    tensors = load_file(path)
    for name in list(tensors):
        stem = name.removesuffix(".weight")
        live = "model." + stem.replace("language_model.model.", "language_model.")
        for place in (stem, live):
            if PREFIX + place + A in factors:
                a, b = (factors[PREFIX + place + kind].float() for kind in (A, B))
                tensors[name] = (tensors[name].float() + scale * (b @ a)).to(tensors[name].dtype)
                merged += 1
    save_file(tensors, output / path.name, {"format": "pt"})
assert merged == len(factors) // 2, (merged, len(factors))
"""

DORA = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
tensors = load_file(source / "adapter_model.safetensors")
for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
    stem = name.removesuffix(".lora_B.weight")
    tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(tensors[name].shape[0]) + 0.5
save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
config = json.loads((source / "adapter_config.json").read_text()) | {"use_dora": True}
(target / "adapter_config.json").write_text(json.dumps(config))
"""

# All names of the largest model, with tensors of a few bytes: what each tensor costs by itself.
MANY = """
import sys
from dataclasses import replace
from pathlib import Path
tools, target = map(Path, sys.argv[1:])
sys.path.insert(0, str(tools))
from make_checkpoint import PRESETS, write_adapter, write_checkpoint
large = PRESETS["InternVL3_5-241B-A28B"]
vision = replace(large.vision, hidden=16, heads=2, intermediate=16, image_size=28)
small = replace(large, vision=vision, hidden=16, heads=4, kv_heads=2, head_dim=8, intermediate=16,
                expert_intermediate=8, vocab=64, image_token=60)
write_checkpoint(target, small, layout="custom", max_shard_size="500KB")
write_adapter(target / "adapter", small, layout="custom", r=2)
"""


def contenders(
    preset: str, folder: Path, output: Path, cases: Sequence[str], ranks: Sequence[int]
) -> list[Contender]:
    """Make what these cases need of a model, in `folder`; returns those who write to `output`."""
    inputs = _Inputs(preset, folder)
    base = inputs.checkpoint("hf")
    python = [sys.executable, "-c"]
    merge = [*STREAMSHARD, "merge-lora", "--quiet", "--output", str(output)]
    found = []
    if "copies" in cases:
        copy = ["cp", "-r", str(base), str(output)]
        found += [
            Contender("cp -r", copy, base),
            Contender("cp -r + sync", copy, base, synced=True),
            Contender("copy around the cache", [*python, COPY, str(base), str(output)], base),
        ]
    if "ranks" in cases:
        for rank in ranks:
            command = [*merge, "--base", str(base), "--adapter", str(inputs.adapter(rank))]
            found.append(Contender(f"merge-lora r={rank}", command, base))
        tried = [*merge, "--base", str(base), "--adapter", str(inputs.adapter(ranks[0]))]
        found.append(Contender("merge-lora --dry-run", [*tried, "--dry-run"], base))
    if "dora" in cases:
        command = [*merge, "--base", str(base), "--adapter", str(inputs.dora(16))]
        found.append(Contender("merge-lora DoRA r=16", command, base))
    if "many" in cases:
        many = inputs.many()
        command = [*merge, "--base", str(many), "--adapter", str(many / "adapter")]
        found.append(Contender("merge-lora, 36,472 small pairs", command, many))
        found.append(Contender("the like, before the first byte", [*command, "--dry-run"], many))
    if "two" in cases:
        both = [f"--adapter={inputs.adapter(rank)}" for rank in (16, 8)]
        found.append(
            Contender("merge-lora two adapters", [*merge, "--base", str(base), *both], base)
        )
    if "shards" in cases:
        arguments = [str(base), str(inputs.adapter(16)), str(output)]
        found.append(Contender("a loop over shards r=16", [*python, SHARDS, *arguments], base))
    if "peft" in cases:
        arguments = [str(base), str(inputs.adapter(16)), str(output)]
        found.append(
            Contender("transformers + peft r=16", [*python, PEFT, *arguments], base, slow=True)
        )
    if {"convert", "l2"} & {*cases}:
        custom = inputs.checkpoint("custom")
        for direction, source, reference in (
            ("hf2custom", base, custom),
            ("custom2hf", custom, base),
        ):
            first, second = ("--hf-path", "--custom-path")[:: 1 if source == base else -1]
            convert = [*STREAMSHARD, direction, "--quiet", "--save-path", str(output), first]
            convert += [str(source), second]
            if "convert" in cases:
                bare = [*convert, str(inputs.without_weights(reference))]
                found.append(Contender(direction, bare, source))
            if "l2" in cases:
                found.append(
                    Contender(
                        f"{direction}, L2 from a reference", [*convert, str(reference)], source
                    )
                )
    if "wrapped" in cases:
        wrapped = inputs.wrapped(16)
        found.append(Contender("merge-lora wrapped r=16", [*merge, str(wrapped)], wrapped))
    return found


class _Inputs:
    """Checkpoints and adapters of one model, made when they are first asked for."""

    def __init__(self, preset: str, folder: Path) -> None:
        self.preset, self.folder = preset, folder

    def _made(self, name: str, command: Sequence[str]) -> Path:
        path = self.folder / name
        if not path.exists():
            # In a process of its own: a child's peak memory counts that of the process it came from.
            subprocess.run([*command], check=True, stdout=subprocess.DEVNULL)
        return path

    def _tool(self, layout: str) -> list[str]:
        tool = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--preset", self.preset]
        return [*tool, "--layout", layout]

    def checkpoint(self, layout: str) -> Path:
        """The whole model."""
        return self._made(layout, [*self._tool(layout), "--output", str(self.folder / layout)])

    def adapter(self, rank: int) -> Path:
        """An adapter of the HF layout."""
        path = str(self.folder / f"r{rank}")
        command = [*self._tool("hf"), "--adapter", path, "--adapter-r", str(rank)]
        return self._made(f"r{rank}", command)

    def many(self) -> Path:
        """A model of very many small tensors, with a pair for nearly each, whatever the preset is."""
        path = self.folder / "many"
        tools = str(ROOT / "tools")
        return self._made(path.name, [sys.executable, "-c", MANY, tools, str(path)])

    def dora(self, rank: int) -> Path:
        """The like with magnitudes."""
        source, target = self.adapter(rank), self.folder / f"dora{rank}"
        return self._made(target.name, [sys.executable, "-c", DORA, str(source), str(target)])

    def without_weights(self, source: Path) -> Path:
        """All that lies beside the weights of a model."""
        target = self.folder / f"bare-{source.name}"
        if not target.exists():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        return target

    def wrapped(self, rank: int) -> Path:
        """A training checkpoint: pairs inside the custom layout, with numbers in B."""
        path = self.folder / f"wrapped{rank}"
        if not path.exists():
            base = self.checkpoint("custom")
            wrap = [*STREAMSHARD, "wrap-lora", "--quiet", "--base", str(base), "--llm-r", str(rank)]
            subprocess.run([*wrap, "--output", str(path)], check=True)
            for file in path.glob("*.safetensors"):
                _fill_factors(file)
        return path


def _fill_factors(file: Path) -> None:
    """Put random numbers into every B of a wrapped checkpoint, which has zeros."""
    with file.open("r+b") as opened:
        nbytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(nbytes))
        for name, entry in header.items():
            if ".lora_B." not in name:
                continue
            begin, end = entry["data_offsets"]
            count = (end - begin) // (4 if entry["dtype"] == "F32" else 2)
            values = np.random.default_rng(begin).normal(0, 0.01, count).astype(np.float32)
            bits = values.view(np.uint32)
            data = values if entry["dtype"] == "F32" else (bits >> 16).astype(np.uint16)
            opened.seek(8 + nbytes + begin)
            opened.write(data.tobytes())
