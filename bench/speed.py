"""Time and memory of streamshard beside `cp -r` and beside transformers + peft, in one run.

    python bench/speed.py --preset InternVL3-1B --preset InternVL3-8B --runs 5 --peers

Generates each checkpoint (HF layout, random bf16) and an r=16 adapter in a temporary folder, runs
the contenders in turn, `--runs` times, and prints a table of medians; `--json FILE` keeps every
figure. With `--convert` hf2custom is measured too, without and with L2 from a reference; with
`--dora` merge-lora of the same adapter with magnitudes. The
files are in the page cache for all contenders alike, dirty pages are flushed before each run,
and every output is deleted before the next.

`cp -r` returns before the disk has the data, `merge-lora` after; `cp -r + sync` is the comparison
that waits too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base, adapter, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", action="append", help="like InternVL3-8B; repeat for several")
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs (default 5)")
    parser.add_argument("--peers", action="store_true", help="also transformers + peft")
    parser.add_argument("--peer-runs", type=int, default=1, help="runs of the peers (default 1)")
    parser.add_argument("--r", type=int, default=16, help="LoRA rank (default 16)")
    parser.add_argument("--workers", type=int, help="threads of merge-lora")
    parser.add_argument("--convert", action="store_true", help="also hf2custom")
    parser.add_argument("--dora", action="store_true", help="also merge-lora with magnitudes")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    options = parser.parse_args(arguments)
    results = []
    for preset in options.preset or ["InternVL3-1B"]:
        with tempfile.TemporaryDirectory(prefix="streamshard-bench-", dir=options.folder) as folder:
            results.append(measure(preset, Path(folder), options))
        print(table(results[-1]), flush=True)
    if options.json:
        report = {"machine": machine(), "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(preset: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Generate one checkpoint and run all contenders on it."""
    base, adapter, output = folder / "base", folder / "adapter", folder / "output"
    generate = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--layout", "hf"]
    generate += ["--preset", preset, "--output", str(base), "--adapter", str(adapter)]
    # In a process of its own: a child's peak memory counts that of the process it came from.
    subprocess.run([*generate, "--adapter-r", str(options.r)], check=True, stdout=sys.stderr)
    python = [sys.executable, "-m", "streamshard"]
    ours = [*python, "merge-lora", "--quiet"]
    ours += ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
    if options.workers:
        ours += ["--workers", str(options.workers)]
    copy = ["cp", "-r", str(base), str(output)]
    contenders: dict[str, tuple[list[str], bool]] = {
        "cp -r": (copy, False),
        "cp -r + sync": (copy, True),
        "merge-lora": (ours, False),
        "merge-lora --dry-run": ([*ours, "--dry-run"], False),
    }
    if options.dora:
        dora = folder / "dora"
        subprocess.run([sys.executable, "-c", DORA, str(adapter), str(dora)], check=True)
        scaled = [str(dora) if part == str(adapter) else part for part in ours]
        contenders["merge-lora, DoRA"] = (scaled, False)
    if options.convert:
        bare, full = folder / "custom", folder / "reference"
        generate = [*generate[:2], "--layout", "custom", "--preset", preset, "--output", str(full)]
        subprocess.run(generate, check=True, stdout=sys.stderr)
        shutil.copytree(full, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
        convert = [*python, "hf2custom", "--quiet", "--hf-path", str(base)]
        convert += ["--save-path", str(output), "--custom-path"]
        contenders["hf2custom"] = ([*convert, str(bare)], False)
        contenders["hf2custom, L2 from a reference"] = ([*convert, str(full)], False)
    peer = [sys.executable, "-c", PEER, str(base), str(adapter), str(output)]
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(options.runs):
        for name, (command, sync) in contenders.items():
            runs.setdefault(name, []).append(timed(command, output, sync=sync))
        if options.peers and number < options.peer_runs:
            runs.setdefault("transformers + peft", []).append(timed(peer, output, sync=False))
    copies = statistics.median(run["seconds"] for run in runs["cp -r"])
    return {
        "preset": preset,
        "bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "r": options.r,
        "contenders": {
            name: {
                "seconds": median(found, "seconds"),
                "times_cp": round(median(found, "seconds") / copies, 3),
                "cpu_seconds": median(found, "cpu_seconds"),
                "peak_rss_mb": median(found, "peak_rss_mb"),
                "runs": found,
            }
            for name, found in runs.items()
        },
    }


def timed(command: list[str], output: Path, *, sync: bool) -> dict[str, float]:
    """Wall and CPU time and peak resident memory of one process; its output is deleted."""
    os.sync()
    started = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if sync:
        os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(output, ignore_errors=True)
    if child.returncode:
        sys.exit(f"failed with {child.returncode}: {' '.join(command)}")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
    }


def median(runs: Sequence[dict[str, float]], key: str) -> float:
    """Median of one figure."""
    return round(statistics.median(run[key] for run in runs), 3)


def table(result: dict[str, Any]) -> str:
    """Markdown for the README."""
    lines = [
        f"{result['preset']} ({result['bytes'] / 1e9:.2f} GB), r={result['r']}",
        "",
        "| | seconds | times `cp -r` | peak memory |",
        "|---|---:|---:|---:|",
    ]
    for name, found in result["contenders"].items():
        memory = found["peak_rss_mb"]
        shown = f"{memory / 1000:.1f} GB" if memory >= 1000 else f"{memory:.0f} MB"
        lines.append(f"| {name} | {found['seconds']:.2f} | {found['times_cp']:.2f} | {shown} |")
    return "\n".join([*lines, ""])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else ""
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
