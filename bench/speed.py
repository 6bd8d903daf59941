"""Time and memory of streamshard beside copying, and beside what others merge with, in one run.

    python bench/speed.py --preset InternVL3-1B --runs 5 --json speed.json
    python bench/speed.py --preset InternVL3-8B --runs 3 --cases copies,ranks --ranks 16,128

Makes each checkpoint (HF layout, random bf16) and its adapters in a temporary folder, runs the contenders
in turn, `--runs` times each, and prints a table of medians; `--json FILE` keeps every figure, `--plot
FOLDER` draws time and memory against model size (needs matplotlib). Each output is deleted before the
next run, and nothing is left to be written by then.

`cp -r` returns before the disk has the data, streamshard after; `cp -r + sync` waits too, and is the 1 of
the ratios. `copy around the cache` is what the disk allows. CPU seconds are a process's own: of what is
written through the cache, a part is done by the kernel for nobody. Memory: the largest resident size of
the process and, where control groups can be made (root), the peak of its group, page cache included.
`--memory-limit 256MB` runs everything in groups of that size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import CASES, ROOT, Contender, contenders

UNIT = "cp -r + sync"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", action="append", help="like InternVL3-8B; repeat for several")
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs (default 5)")
    parser.add_argument(
        "--cases",
        default="copies,ranks,dora,wrapped,two,convert,l2,shards",
        help=f"some of {','.join(CASES)} (default: all but peft)",
    )
    parser.add_argument("--ranks", default="8,16,64,128,256", help="of merges (default: all these)")
    parser.add_argument("--workers", type=int, help="threads of streamshard")
    parser.add_argument("--io", help="how streamshard writes (default auto)")
    parser.add_argument("--memory-limit", help="run in control groups of this size, like 256MB")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--json", type=Path, help="keep every figure in this file")
    parser.add_argument("--plot", type=Path, help="draw a picture, size.png, into this folder")
    options = parser.parse_args(arguments)
    wrong = {*options.cases.split(",")} - {*CASES}
    if wrong:
        parser.error(f"there are no cases {', '.join(sorted(wrong))}")
    results = []
    for preset in options.preset or ["InternVL3-1B"]:
        with tempfile.TemporaryDirectory(prefix="streamshard-bench-", dir=options.folder) as folder:
            results.append(measure(preset, Path(folder), options))
        print(table(results[-1]), flush=True)
        if options.json:
            report = {"machine": machine(options.folder), "results": results}
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


def measure(preset: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make the inputs of one model and run all contenders on them."""
    output = folder / "output"
    ranks = [int(rank) for rank in options.ranks.split(",")]
    taking_part = contenders(preset, folder, output, options.cases.split(","), ranks)
    more = [f"--workers={options.workers}"] if options.workers else []
    more += [f"--io={options.io}"] if options.io else []
    limit = None
    if options.memory_limit:
        limit = int(float(options.memory_limit.upper().removesuffix("MB")) * 1e6)
    environment = with_bytecode(folder / "bytecode")
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.runs):
        for one in taking_part:
            if number and one.slow:
                continue
            command = [*one.command, *(more if "streamshard" in one.command else [])]
            runs.setdefault(one.name, []).append(timed(one, command, output, limit, environment))
            print(f"{preset}, {number + 1}: {one.name} {runs[one.name][-1]}", file=sys.stderr)
    figures: dict[str, dict[str, Any]] = {}
    for name, found in runs.items():
        figures[name] = {key: median(found, key) for key in found[0]}
    unit = figures.get(UNIT)
    for name, found in runs.items():
        for key, times in (("seconds", "times_cp"), ("cpu_seconds", "times_cp_cpu")):
            figures[name][times] = unit and round(figures[name][key] / unit[key], 3)
        figures[name]["runs"] = found
    return {
        "preset": preset,
        "bytes": sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors")),
        "memory_limit": limit,
        "contenders": figures,
    }


def with_bytecode(folder: Path) -> dict[str, str]:
    """An environment in which our modules are compiled already, as they are where they are installed."""
    found = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found["PYTHONPYCACHEPREFIX"] = str(folder)
    compiled = [sys.executable, "-m", "compileall", "-q", str(ROOT / "streamshard")]
    subprocess.run(compiled, check=True, env=found)
    return found


def timed(
    one: Contender,
    command: Sequence[str],
    output: Path,
    limit: int | None,
    environment: Mapping[str, str],
) -> dict[str, float | None]:
    """Wall and CPU time and memory of one process; its output is deleted."""
    os.sync()
    cached = share_in_cache(one.source)
    with group(limit) as place:

        def join() -> None:
            if place is not None:
                (place / "cgroup.procs").write_text(str(os.getpid()))

        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            preexec_fn=join,  # noqa: PLW1509 - there are no threads
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if one.synced:
            sync(output)
        seconds = time.perf_counter() - started
        peak = None if place is None else peak_of(place)
    shutil.rmtree(output, ignore_errors=True)
    if child.returncode:
        sys.exit(f"failed with {child.returncode}: {' '.join(command)}")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
        "group_peak_mb": None if peak is None else round(peak / 1e6, 1),
        "source_cached": cached,
    }


def sync(folder: Path) -> None:
    """Wait until the disk has a folder, and nothing else of the machine."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def share_in_cache(folder: Path) -> float | None:
    """How much of the weights is in the page cache; None where that cannot be told."""
    try:
        from streamshard.disk._mapping import Mapping
    except ImportError:
        return None
    absent, step = bytearray(), 1 << 20
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            absent += Mapping(file.fileno(), path.stat().st_size).absent(step, step)
    return round(1 - sum(absent) / max(len(absent), 1), 3)


# --- control groups of Linux ----------------------------------------------------------------------

GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


@contextlib.contextmanager
def group(limit: int | None) -> Iterator[Path | None]:
    """A new control group, or None where none can be made."""
    for root, most, peak in GROUPS:
        place = root / f"streamshard-bench-{os.getpid()}"
        try:
            place.mkdir()
        except OSError:
            continue
        try:
            if (place / peak).exists():
                if limit is not None:
                    (place / most).write_text(str(limit))
                yield place
                return
        finally:
            place.rmdir()
    if limit is not None:
        sys.exit("no control group can be made here, so there is no limit of memory")
    yield None


def peak_of(place: Path) -> int:
    """The most memory that a group has had, page cache included."""
    return next(int((place / peak).read_text()) for *_, peak in GROUPS if (place / peak).exists())


# --- what is told ---------------------------------------------------------------------------------


def median(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    """Median of one figure."""
    values = [run[key] for run in runs if run[key] is not None]
    return round(statistics.median(values), 3) if values else None


def table(result: dict[str, Any]) -> str:
    """Markdown for the README."""
    limit = result["memory_limit"]
    where = f", in {limit / 1e6:.0f} MB" if limit else ""
    lines = [
        f"{result['preset']} ({result['bytes'] / 1e9:.2f} GB{where})",
        "",
        f"| | seconds | times `{UNIT}` | CPU s | times its | peak memory | with cache |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in result["contenders"].items():
        cells = [
            name,
            f"{found['seconds']:.2f}",
            f"{found['times_cp'] or 0:.2f}",
            f"{found['cpu_seconds']:.2f}",
            f"{found['times_cp_cpu'] or 0:.2f}",
            _memory(found["peak_rss_mb"]),
            _memory(found["group_peak_mb"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _memory(megabytes: float | None) -> str:
    if megabytes is None:
        return ""
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def plot(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """A picture of two panels: time and memory against the size of the model, `size.png`."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    names = list(dict.fromkeys(name for result in results for name in result["contenders"]))
    panels = figure.subplots(1, 2)
    labels = (("seconds", "time, s"), ("peak_rss_mb", "peak memory, MB"))
    for axes, (key, label) in zip(panels, labels, strict=True):
        for place, name in enumerate(names):
            shown = [result for result in results if name in result["contenders"]]
            sizes = [result["bytes"] / 1e9 for result in shown]
            values = [result["contenders"][name][key] for result in shown]
            ours = name.startswith(("merge", "hf2", "custom2"))
            look = {"color": f"C{place % 10}", "lw": 2 if ours else 1, "ls": "-" if ours else "--"}
            axes.plot(sizes, values, marker="o", label=name, **look)
        axes.set(xlabel="weights, GB", ylabel=f"{label} (log)", xscale="log", yscale="log")
        axes.set_xticks([result["bytes"] / 1e9 for result in results], minor=False)
        axes.xaxis.set_major_formatter("{x:.1f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()  # between two sizes their labels lie on each other
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(folder / "size.png", dpi=150)


def machine(folder: Path | None) -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else ""
    asked = ["df", "--output=source,fstype,avail", str(folder or tempfile.gettempdir())]
    disk = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "disk": " ".join(disk.splitlines()[-1].split()) if disk else "",
        "load": os.getloadavg(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
