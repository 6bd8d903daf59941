"""A plan is a value: complete, made of headers alone, and carried out anywhere with the same bytes."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import make
from reference import read

from streamshard import hf_to_custom, merge_lora
from streamshard.disk.system import System, system
from streamshard.engine.job import Plan
from streamshard.engine.run import execute
from streamshard.errors import ChangedError

EXECUTE = """
import json, pickle, sys
from streamshard.engine.run import execute
from streamshard.errors import ChangedError
print(json.dumps(execute(pickle.load(sys.stdin.buffer))))
"""


class Stop(Exception):  # noqa: N818 - no error
    """Ends a command when its plan is known."""


def plan_of(command: Any, **options: Any) -> Plan:
    """The plan that a command makes, nothing of which is carried out."""
    found: list[Plan] = []

    def stop(plan: Plan) -> None:
        found.append(plan)
        raise Stop

    with pytest.raises(Stop):
        command(**options, on_plan=stop)
    return found[0]


def content(folder: Path) -> dict[str, Any]:
    """All files of an output, but for what a record says of the run itself."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    record = json.loads(found["streamshard.json"])
    found["streamshard.json"] = lasting(record)
    return found


def lasting(report: dict[str, Any]) -> dict[str, Any]:
    varying = ("output", "seconds", "date", "peak_rss_bytes", "record_digest")
    return {key: value for key, value in report.items() if key not in varying}


@pytest.fixture
def merge(pair, tmp_path):
    """A merge as a user calls it, and what it is expected to write."""
    options = {"base": pair.base, "adapter": pair.adapter, "max_shard_size": "3KB", "sha256": True}
    report = merge_lora(**options, output=tmp_path / "expected")
    return options, report, tmp_path / "expected"


def test_a_plan_is_carried_out_in_another_process(merge, tmp_path):
    options, report, expected = merge
    plan = plan_of(merge_lora, **options, output=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE], input=pickle.dumps(plan), capture_output=True, check=True
    )
    assert content(tmp_path / "made") == content(expected)
    assert lasting(json.loads(done.stdout)) == lasting(json.loads(json.dumps(report)))


def test_a_plan_is_carried_out_twice(merge, tmp_path):
    """It does not change when it is."""
    options, _, expected = merge
    plan = plan_of(merge_lora, **options, output=tmp_path / "made")
    before = pickle.dumps(plan)
    execute(plan)
    execute(dataclasses.replace(plan, output=tmp_path / "again"))
    assert content(tmp_path / "made") == content(tmp_path / "again") == content(expected)
    assert pickle.dumps(plan) == before


def test_inputs_must_be_as_they_were_planned_with(merge, pair, tmp_path):
    plan = plan_of(merge_lora, **merge[0], output=tmp_path / "made")
    names = {Path(path).name for path in plan.inputs}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= names
    for path in (*pair.base.glob("*.safetensors"), pair.base / "tokenizer_config.json"):
        data = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(ChangedError, match=path.name):
            execute(plan)
        assert not (tmp_path / "made").exists()
        plan = plan_of(merge_lora, **merge[0], output=tmp_path / "made")


def test_the_dry_run_shows_the_plan(merge, tmp_path):
    plan = plan_of(merge_lora, **merge[0], output=tmp_path / "made")
    shown: list[Plan] = []
    report = merge_lora(**merge[0], output=tmp_path / "made", dry_run=True, on_plan=shown.append)
    assert report["plan"] == shown[0].as_dict()
    # Of the disk others may take something in between.
    assert dataclasses.replace(shown[0], free_nbytes=plan.free_nbytes) == plan
    assert report["tensors"] == sum(len(shard.tensors) for shard in plan.shards)
    assert report["bytes"] == plan.nbytes
    assert list(report) == list(merge[1])


def test_a_plan_tells_what_is_compared_with_what(pair, tmp_path):
    plan = plan_of(merge_lora, base=pair.base, adapter=pair.adapter, output=tmp_path / "made")
    assert set(plan.compared.names) == set(read(pair.base))
    assert plan.compared.reference == {}  # each with what it is made of
    assert plan.must_change
    assert plan.compared.source == str(pair.base)


def test_a_plan_is_made_of_headers(tmp_path, monkeypatch):
    """Of the weight files as many bytes are read as their headers have."""
    hf, custom = (make(tmp_path / side, "tiny", side) for side in ("hf", "custom"))
    read_of: dict[str, int] = {}
    opened: dict[int, str] = {}

    def opening(path: Any, flags: int) -> int:
        descriptor = System.open(system, path, flags)
        opened[descriptor] = str(path)
        return descriptor

    def reading(descriptor: int, out: memoryview, offset: int) -> int:
        count = System.pread(system, descriptor, out, offset)
        path = opened[descriptor]
        read_of[path] = max(read_of.get(path, 0), offset + count)
        return count

    monkeypatch.setattr(system, "open", opening)
    monkeypatch.setattr(system, "pread", reading)
    plan_of(hf_to_custom, hf_path=hf, custom_path=custom, save_path=tmp_path / "made")
    weights = {path: end for path, end in read_of.items() if path.endswith(".safetensors")}
    assert len(weights) >= 2
    for path, end in weights.items():
        with Path(path).open("rb") as file:
            assert end <= 8 + int.from_bytes(file.read(8), "little")
