"""What memory grows with: bytes a tensor while planning and comparing, and what is kept in queues.

Counted by tracemalloc in models of true names and counts, whose data is holes: no measured times,
and resident memory only of the largest model, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import sparse
from make_checkpoint import write_adapter, write_checkpoint
from marks import slow
from presets import PRESETS, Preset, tensor_shapes

from streamshard.checkpoint.json_files import json_pieces
from streamshard.commands import diff
from streamshard.engine.budget import peak_rss_bytes
from streamshard.tensors.comparing import PART_ELEMENTS, squared_distance

pytestmark = slow

MOE = PRESETS["InternVL3_5-30B-A3B"]


def small(model: Preset) -> Preset:
    """All names of a model, each of a few bytes."""
    return replace(
        model,
        vision=replace(model.vision, hidden=16, heads=2, intermediate=16, image_size=28),
        hidden=16,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=16,
        expert_intermediate=8,
        vocab=64,
        image_token=60,
    )


SMALL = small(MOE)  # 19,213 names
LARGEST = small(PRESETS["InternVL3_5-241B-A28B"])


def traced(call: str) -> tuple[dict[str, Any], int]:
    """The report of a call in a process of its own, and the most that it had allocated at a time."""
    code = f"""
import json, tracemalloc
import streamshard.commands.convert, streamshard.commands.inspect, safetensors.numpy
from streamshard import diff, inspect, custom_to_hf, hf_to_custom
streamshard.engine.plan.disk_free = lambda _: 10**15
tracemalloc.start()
report = {call}
print(json.dumps([report, tracemalloc.get_traced_memory()[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report, peak = json.loads(done.stdout)
    return report, peak


def conversion(layout: str, folders: dict[str, Path], output: Path) -> str:
    """The call of a dry run."""
    name = {"custom": "hf_to_custom", "hf": "custom_to_hf"}[layout]
    paths = {f"{side}_path": str(folder) for side, folder in folders.items()}
    return f"{name}(**{paths}, save_path={str(output)!r}, dry_run=True)"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe")
    return {layout: sparse(root / layout, MOE, layout) for layout in ("custom", "hf")}


def test_inspecting_costs_little_a_tensor(moe):
    report, peak = traced(f"inspect({str(moe['custom'])!r})")
    assert report["tensors"] == 19213
    assert peak < 600 * report["tensors"]


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_planning_costs_little_a_tensor(layout, moe, tmp_path):
    """For each tensor of source and reference; opening them costs most."""
    report, peak = traced(conversion(layout, moe, tmp_path / "out"))
    assert report["tensors"] == len(tensor_shapes(MOE, layout))
    assert peak < 450 * 2 * report["tensors"]


def test_comparing_costs_little_a_tensor(tmp_path):
    """Also if all of them differ, so that the report lists them."""
    for seed, name in enumerate(("one", "other")):
        write_checkpoint(tmp_path / name, SMALL, layout="custom", seed=seed)
    paths = [str(tmp_path / name) for name in ("one", "other")]
    report, peak = traced(f"diff(*{paths}, workers=1)")
    assert len(report["different"]) == report["tensors"] == 19213
    assert peak < 700 * 2 * report["tensors"]


def test_the_pool_gets_some_pairs_at_a_time(monkeypatch):
    ahead, taken, done = [], 0, 0

    def pairs() -> Any:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield f"t{number}", None, None

    def distance(*_: Any) -> tuple[float, float]:
        nonlocal done
        done += 1
        ahead.append(taken - done)
        return float(done % 2), 4.0

    monkeypatch.setattr(diff, "tensor_distance", distance)
    squared, norms = diff._measure(pairs(), 1, None)
    assert list(squared) == [f"t{number}" for number in range(1000)]
    assert set(norms.values()) == {4.0}
    assert max(ahead) < 64


@pytest.mark.parametrize("sort_keys", [True, False])
def test_json_in_pieces_is_json(sort_keys):
    content = {
        "ü": [1, 2.5, None, True],
        "b": {str(i): "x" * 9 for i in range(9999)},
        "a": "\udce9",
    }
    pieces = list(json_pieces(content, sort_keys=sort_keys))
    assert max(map(len, pieces)) < 100_000
    # Half of a surrogate pair, as of a path that is not UTF-8, is spelled out: strict readers refuse it.
    spelled = content | {"a": r"\udce9"}
    text = json.dumps(spelled, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    assert b"".join(pieces) == text.encode()
    assert json.loads(b"".join(pieces)) == spelled
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(json_pieces({"x": float("nan")}))


@pytest.mark.parametrize("dtypes", [("F32", "F16"), ("F16", "F32"), ("F64", "F64"), ("U8", "F32")])
@pytest.mark.parametrize("elements", [0, 1, PART_ELEMENTS, 3 * PART_ELEMENTS + 7])
def test_distances_are_of_all_parts(dtypes, elements):
    numpy = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8}
    rng = np.random.default_rng(elements)
    one, other = (rng.integers(0, 100, elements).astype(numpy[dtype]) for dtype in dtypes)
    expected = float(((one.astype(np.float64) - other.astype(np.float64)) ** 2).sum())
    found = squared_distance(one.view(np.uint8), dtypes[0], other.view(np.uint8), dtypes[1])
    assert found == expected  # whole numbers: sums are exact in any order


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing better is known")
def test_the_peak_is_not_that_of_who_started_us():
    """Linux hands `ru_maxrss` on to what a process starts."""
    code = "import resource; from streamshard.engine.budget import peak_rss_bytes as p; print(p())"
    ballast = bytearray(b"x") * 300_000_000
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(done.stdout) < 200e6
    assert peak_rss_bytes() > len(ballast)


def test_a_reference_without_weights_costs_nothing_a_tensor(moe, tmp_path):
    bare = tmp_path / "custom"
    bare.mkdir()
    (bare / "config.json").write_bytes((moe["custom"] / "config.json").read_bytes())
    report, peak = traced(conversion("custom", {**moe, "custom": bare}, tmp_path / "out"))
    assert report["tensors"] == 19213
    assert peak < 600 * report["tensors"]


def resident(*arguments: str | Path) -> tuple[dict[str, Any], int]:
    """The report of a command, and its largest resident memory."""
    command = [sys.executable, "-m", "streamshard", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return report, report["peak_rss_bytes"]


def of_a_model(folder: Path, model: str | Preset, shard: str) -> Path:
    """In both layouts, and an adapter of it."""
    for layout in ("custom", "hf"):
        write_checkpoint(folder / layout, model, layout=layout, max_shard_size=shard)
    write_adapter(folder / "adapter", model, layout="custom", r=2)
    return folder


@pytest.fixture(scope="module")
def largest(tmp_path_factory):
    return of_a_model(tmp_path_factory.mktemp("largest"), LARGEST, "500KB")


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    """What has hardly a tensor: its peaks are those of interpreter and libraries on this machine."""
    return of_a_model(tmp_path_factory.mktemp("least"), "tiny", "5GB")


@pytest.mark.skipif(sys.platform != "linux", reason="measured there")
def test_a_merge_of_a_pair_for_each_of_37000_tensors(largest, least, tmp_path):
    def merged(folder: Path) -> tuple[dict[str, Any], int]:
        how = "--base", folder / "custom", "--adapter", folder / "adapter"
        return resident("merge-lora", *how, "--output", tmp_path / folder.name)

    report, peak = merged(largest)
    assert report["merged"] == 36472
    assert peak - merged(least)[1] < 80e6


@pytest.mark.skipif(sys.platform != "linux", reason="measured there")
@pytest.mark.parametrize("command", ["hf2custom", "custom2hf"])
def test_a_conversion_of_37000_tensors(command, largest, least, tmp_path):
    def converted(folder: Path) -> tuple[dict[str, Any], int]:
        how = "--hf-path", folder / "hf", "--custom-path", folder / "custom"
        return resident(command, *how, "--save-path", tmp_path / folder.name)

    report, peak = converted(largest)
    assert report["tensors"] > 37000
    assert peak - converted(least)[1] < 32e6
