"""The conversions on the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from folders import COMMAND, KEYS, OTHER, command, convert
from presets import tensor_shapes
from reference import digests


@pytest.mark.parametrize("style", ["-", "_"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_command_gives_what_the_function_gives(layout, style, folders, tmp_path, cli):
    convert(layout, folders[OTHER[layout]], folders[layout], tmp_path / "expected")
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    spelled = [a.replace("-path", f"{style}path") if isinstance(a, str) else a for a in call]
    outcome = cli(*spelled, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.err.startswith("converting: ")
    report = json.loads(outcome.out)
    assert report.keys() >= KEYS
    assert report["command"] == COMMAND[layout]
    assert set(report["l2"]) == {
        "reference", "sum", "per_parameter", "global", "compared", "skipped",
    }  # fmt: skip
    made, expected = digests(tmp_path / "out"), digests(tmp_path / "expected")
    del made["streamshard.json"], expected["streamshard.json"]
    assert made == expected


def test_the_command_says_what_it_did(folders, tmp_path, cli):
    outcome = cli(*command("hf", folders["custom"], folders["hf"], tmp_path / "out"))
    assert outcome.code == 0
    assert "Converted 85 tensors" in outcome.out
    assert "missing: none" in outcome.out
    assert f"L2 from {folders['hf']}: " in outcome.out
    assert re.search(r": \S+ \(sum over tensors \S+, per parameter \S+\)\n    So far", outcome.out)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_dry_run(layout, folders, tmp_path, cli):
    before = digests(tmp_path)
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    outcome = cli(*call, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["dry_run"]
    assert report["tensors"] == len(tensor_shapes("tiny", layout))
    assert [file["name"] for file in report["plan"]["files"]] == ["model.safetensors"]
    assert digests(tmp_path) == before
    assert "Nothing was written" in cli(*call, "--dry-run").out


HEAVY = "torch transformers peft"


def test_nothing_heavy_is_imported(folders, tmp_path):
    """In a process of its own, with a reference that differs."""
    call = [*map(str, command("hf", folders["custom"], folders["hf"], tmp_path / "out")), "--json"]
    code = f"""
import json, sys
from streamshard.cli import main
sys.argv[1:] = {call!r}
try:
    main()
except SystemExit as exit_:
    assert not exit_.code, exit_.code
print(json.dumps([name for name in {HEAVY!r}.split() if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report, heavy = done.stdout.splitlines()
    assert json.loads(report)["l2"]["sum"] > 0
    assert json.loads(heavy) == []
