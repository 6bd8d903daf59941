"""The largest model, InternVL3.5-241B-A28B, in parts: time, memory, tasks, and two workers beside one.

    python bench/scale.py --json scale.json
    python bench/scale.py --only plan,parts --quick

- plan: true names, shapes and sizes, 97 files of holes, which take no disk. The time to open, check and
  plan, the most memory, the bytes of each of 97 parts, and the largest task of a Dask cluster. Of a
  conversion; of an adapter of attention; and of one of every expert, 72,944 tensors.
- parts: all names with shapes of a few bytes, written by 8 parts as processes, 3 at a time, and compared
  with one run.
- workers: a merge at r=128 by one Dask worker and by two, each on a processor of its own; base and output
  in memory (`--folder`, /dev/shm), so that no disk decides.

Everything is in a temporary folder, which is deleted. `--quick` takes smaller models, once. Exits with 1
if a bound is not kept, or bytes differ.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tools")]

import make_checkpoint as maker  # noqa: E402
import presets  # noqa: E402
from interrupted_runs import content  # type: ignore[import-not-found]  # noqa: E402
from scenarios import replaced  # noqa: E402

write_safetensors = maker._write_safetensors  # noqa: SLF001 - with nothing in the place of data
LARGEST = "InternVL3_5-241B-A28B"
MIDDLE = "InternVL3_5-30B-A3B"
PARTS = 8
AT_ONCE = 3
BOUNDS = {"seconds": 2.0, "peak_rss_bytes": 200_000_000, "task_bytes": 300_000, "two_of_one": 0.6}
FOLDER = Path("/dev/shm")
"""In memory."""

# Makes a plan in a process of its own; the disk need not have room for what is never written.
PLAN = """
import json, sys, time
begun = time.perf_counter()
import gc
gc.set_threshold(50_000, 20, 50)  # as the command line does
import streamshard
from streamshard.engine import plan as planning
from streamshard.engine.budget import peak_rss_bytes
planning.disk_free = lambda _: 10**15
command, options, count = json.loads(sys.argv[1])
found = {}
def note(made):
    found.update(made=made, seconds=time.perf_counter() - called, peak=peak_rss_bytes())
called = time.perf_counter()
report = getattr(streamshard, command)(**options, dry_run=True, on_plan=note)
made, seconds, whole = found.pop("made"), found["seconds"], time.perf_counter() - begun
from streamshard.engine.cluster_task import task_bytes
from streamshard.engine.division import divided
loads = [sum(shard.nbytes for shard in own) for own in divided(made.shards, count)]
print(json.dumps({
    "tensors": report["tensors"], "bytes": report["bytes"], "shards": report["shards"],
    "merged": report["merged"], "seconds": seconds, "process_seconds": whole,
    "peak_rss_bytes": found["peak"],
    "task_bytes": max(len(task_bytes(made, shard, "0" * 64)) for shard in made.shards),
    "part_bytes": loads}))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="plan,parts,workers", help="some of these")
    parser.add_argument("--cases", help="plans whose names contain this")
    parser.add_argument("--quick", action="store_true", help="smaller models, each once")
    parser.add_argument("--runs", type=int, default=5, help="of what is timed (default 5)")
    parser.add_argument("--preset", default="InternVL3-2B", help="what workers merge")
    parser.add_argument("--folder", type=Path, default=FOLDER if FOLDER.is_dir() else None)
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"machine": {"processors": os.cpu_count(), "of": platform.machine()}}
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory(prefix="streamshard-scale-", dir=options.folder) as made:
            found[name] = _MEASURES[name](Path(made), options)
        print(table(name, found[name]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    wrong = [*broken(found)]
    sys.exit("\n".join(wrong) or 0)


def broken(found: dict[str, Any]) -> Iterator[str]:
    """Which bounds are not kept."""
    for case, figures in found.get("plan", {}).items():
        for what in ("seconds", "peak_rss_bytes", "task_bytes"):
            # Every value of an adapter is looked at: that of every expert has 72,944 tensors more.
            if figures[what] > BOUNDS[what] and not (what == "seconds" and "every" in case):
                yield f"plan, {case}: {what} {figures[what]:,} and not {BOUNDS[what]:,}"
    if "parts" in found and not found["parts"]["same"]:
        yield "parts: other bytes than those of one run"
    if found.get("workers", {}).get("two_of_one", 0) > BOUNDS["two_of_one"]:
        yield f"workers: two take {found['workers']['two_of_one']} of one, not {BOUNDS['two_of_one']}"


# --- plans ----------------------------------------------------------------------------------------


def plans(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plans of the largest model, each in a process of its own; medians."""
    preset = maker.PRESETS[MIDDLE if options.quick else LARGEST]
    with replaced(maker, {"_write_safetensors": _sparse, "tensor_chunks": lambda *_: iter(())}):
        for layout in presets.LAYOUTS:
            maker.write_checkpoint(folder / layout, preset, layout=layout)
        maker.write_adapter(folder / "every", preset, layout="custom", r=1)
        with replaced(maker, {"llm_linears": _of_attention}):
            maker.write_adapter(folder / "attention", preset, layout="custom", r=16)
    (folder / "bare").mkdir()
    for file in (folder / "custom").iterdir():
        if "safetensors" not in file.name:
            shutil.copy2(file, folder / "bare")
    base, output = str(folder / "custom"), str(folder / "out" / "merged")
    hf, bare = str(folder / "hf"), str(folder / "bare")
    cases = {
        "hf2custom": ("hf_to_custom", {"hf_path": hf, "custom_path": bare, "save_path": output})
    }
    for name, what in (("attention", "attention, r=16"), ("every", "every expert, r=1")):
        merge = {"base": base, "adapter": str(folder / name), "output": output}
        cases[f"merge-lora, {what}"] = "merge_lora", merge
    found = {}
    for case, (command, arguments) in cases.items():
        if options.cases and options.cases not in case:
            continue
        text = json.dumps([command, arguments, 97])
        runs = [_answer([sys.executable, "-c", PLAN, text]) for _ in range(_runs(options))]
        loads = runs[0].pop("part_bytes")
        timed = {key: [run[key] for run in runs] for key in ("seconds", "process_seconds")}
        found[case] = {
            **runs[0],
            **{key: round(statistics.median(values), 3) for key, values in timed.items()},
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            "parts": {"count": len(loads), "least": min(loads), "most": max(loads)},
            "runs": runs,
        }
    return found


def _answer(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _runs(options: argparse.Namespace) -> int:
    return 1 if options.quick else int(options.runs)


def _of_attention(preset: Any, layout: str, **how: Any) -> list[Any]:
    """What an adapter of attention alone has a pair of in each layer."""
    return [
        one for one in presets.llm_linears(preset, layout, **how) if ".mlp" not in f".{one.name}"
    ]


def _sparse(path: Path, tensors: Iterable[Any], dtype: str, seed: int, tell: Any) -> None:
    """Write a file with a hole in the place of its data, but for a 1 at the begin of what LoRA has."""
    own = sorted(tensors, key=lambda tensor: tensor.name)
    write_safetensors(path, own, dtype, seed, tell)
    width, end = maker.DTYPES[dtype].width, path.stat().st_size
    with path.open("r+b") as file:
        for tensor in own:
            if ".lora_" in tensor.name:  # an update of zeros is refused
                file.seek(end)
                file.write(b"\x00\x00\x80\x3f")
            end += tensor.elements * width
        file.truncate(end)


# --- all names, in parts --------------------------------------------------------------------------


def parts(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All names of the model, each of a few bytes: 8 parts, some at once, and a run on one machine."""
    large = maker.PRESETS[MIDDLE if options.quick else LARGEST]
    vision = replace(large.vision, hidden=16, heads=2, intermediate=16, image_size=28)
    small = replace(large, vision=vision, hidden=16, heads=4, kv_heads=2, head_dim=8,
                    intermediate=16, expert_intermediate=8, vocab=64, image_token=60)  # fmt: skip
    base, adapter = folder / "base", folder / "adapter"
    written = maker.write_checkpoint(
        base, small, layout="custom", max_shard_size="200KB" if options.quick else "215KB"
    )
    maker.write_adapter(adapter, small, layout="custom", r=2)
    merge = [sys.executable, "-m", "streamshard", "merge-lora", "--quiet", "--workers", "1"]
    merge += ["--base", str(base), "--adapter", str(adapter), "--output"]
    clean = folder / "clean" / "merged"
    begun = time.perf_counter()
    subprocess.run([*merge, str(clean)], check=True, cwd=ROOT)
    alone = time.perf_counter() - begun
    output = folder / "out" / "merged"
    begun = time.perf_counter()
    waiting = [
        [*merge, str(output), "--part", f"{number}/{PARTS}"] for number in range(PARTS, 0, -1)
    ]
    going: list[subprocess.Popen[bytes]] = []
    while waiting or going:
        while waiting and len(going) < AT_ONCE:
            going.append(subprocess.Popen(waiting.pop(), cwd=ROOT))
        going[0].wait()
        if any(one.poll() for one in going):
            sys.exit("a part has failed")
        going = [one for one in going if one.poll() is None]
    seconds = time.perf_counter() - begun
    left = sorted(path.name for path in output.parent.iterdir())
    return {
        "tensors": written.tensors,
        "shards": len(written.files),
        "parts": PARTS,
        "at_once": AT_ONCE,
        "seconds": round(seconds, 2),
        "one_run_seconds": round(alone, 2),
        "same": left == ["merged"] and content(output) == content(clean),
    }


# --- workers --------------------------------------------------------------------------------------


def workers(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One Dask worker and two, in turn, at a merge whose files are in memory; medians."""
    from dask_cluster import dask_cluster, preload  # type: ignore[import-not-found]

    preset = "InternVL3-1B" if options.quick else options.preset
    base, adapter, output = folder / "base", folder / "adapter", folder / "out" / "merged"
    written = maker.write_checkpoint(base, preset, layout="hf", max_shard_size="200MB")
    maker.write_adapter(adapter, preset, layout="hf", r=128)
    merge = [sys.executable, "-m", "streamshard", "merge-lora", "--json", "--base", str(base)]
    merge += ["--adapter", str(adapter), "--output", str(output)]
    times: dict[str, list[float]] = {"1": [], "2": []}
    places = [folder / "clusters" / name for name in "12"]
    for place in places:
        place.mkdir(parents=True)
    with dask_cluster(places[0]) as one, dask_cluster(places[1]) as two:
        for cluster, count in ((one, 1), (two, 2)):
            for number in range(count):
                pinned = f"import os\nos.sched_setaffinity(0, {{{number}}})\n"
                cluster.worker("--resources", "streamshard=1", *preload(cluster, pinned))
        for run in range(_runs(options) + 1):
            for cluster, name in ((one, "1"), (two, "2")):
                begun = time.perf_counter()
                _answer([*merge, "--scheduler", cluster.address])
                if run:  # the first one imports what workers need
                    times[name].append(round(time.perf_counter() - begun, 2))
                shutil.rmtree(output.parent)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "preset": preset,
        "bytes": written.nbytes,
        "shards": len(written.files),
        "seconds": medians,
        "two_of_one": round(medians["2"] / medians["1"], 3),
        "runs": times,
    }


_MEASURES = {"plan": plans, "parts": parts, "workers": workers}


def table(name: str, found: dict[str, Any]) -> str:
    """The figures of a measure, for people."""
    if name == "plan":
        lines = [
            "| plan | tensors | files | bytes | seconds | memory | part, of 97 | largest task |"
        ]
        lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
        for case, one in found.items():
            shares = one["parts"]
            lines.append(
                f"| {case} | {one['tensors']:,} | {one['shards']} | {one['bytes'] / 1e9:.1f} GB | "
                f"{one['seconds']:.2f} | {one['peak_rss_bytes'] / 1e6:.0f} MB | "
                f"{shares['least'] / 1e9:.2f} to {shares['most'] / 1e9:.2f} GB | "
                f"{one['task_bytes'] / 1e3:.0f} KB |"
            )
        return "\n".join(lines)
    if name == "parts":
        return (
            f"{found['tensors']:,} small tensors in {found['shards']} files: {found['parts']} parts, "
            f"{found['at_once']} at once, {found['seconds']} s; one run {found['one_run_seconds']} s; "
            f"{'the same bytes' if found['same'] else 'OTHER BYTES'}"
        )
    return (
        f"{found['preset']}, {found['bytes'] / 1e9:.1f} GB in {found['shards']} files, r=128: one worker "
        f"{found['seconds']['1']} s, two {found['seconds']['2']} s: {found['two_of_one']} of that"
    )


if __name__ == "__main__":
    main()
