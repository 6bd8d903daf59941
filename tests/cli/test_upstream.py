"""InternVL's scripts as drop-ins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from folders import OTHER, config_of, convert, make, put, without_weights, wrapped
from reference import digests, read
from scripts import TOOLS


def script(layout: str, **paths: Path) -> subprocess.CompletedProcess[str]:
    name = {"custom": "internvl_hf2custom.py", "hf": "internvl_custom2hf.py"}[layout]
    arguments = [part for key, path in paths.items() for part in (f"--{key}", str(path))]
    return subprocess.run(
        [sys.executable, TOOLS / name, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_scripts_print_the_same_facts(layout, tmp_path):
    made = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    paths = {"custom_path": made["custom"], "hf_path": made["hf"], "save_path": tmp_path / "out"}
    done = script(layout, **paths)
    assert done.returncode == 0, done.stderr
    report = convert(layout, made[OTHER[layout]], made[layout], tmp_path / "same")
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["Missing keys"] == "[]"
    assert lines["Unexpected keys"] == "[]"
    assert float(lines["Total L2 distance"]) == pytest.approx(report["l2"]["sum"], rel=1e-6)
    average = next(value for key, value in lines.items() if "verage" in key)
    assert float(average) == pytest.approx(report["l2"]["per_parameter"], rel=1e-3)
    ours, same = digests(tmp_path / "out"), digests(tmp_path / "same")
    del ours["streamshard.json"], same["streamshard.json"]
    assert ours == same
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_script_fails_where_the_command_does(tmp_path):
    made = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    without_weights(made["custom"])
    content = read(made["hf"])
    name = "language_model.model.norm.weight"
    del content[name]
    put(made["hf"], content)
    paths = {"custom_path": made["custom"], "hf_path": made["hf"], "save_path": tmp_path / "out"}
    done = script("custom", **paths)
    assert done.returncode == 3
    assert name in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_script_without_distance(tmp_path):
    made = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    without_weights(made["hf"])
    paths = {"custom_path": made["custom"], "hf_path": made["hf"], "save_path": tmp_path / "out"}
    done = script("hf", **paths)
    assert done.returncode == 0, done.stderr
    assert "L2" not in done.stdout
    assert str(tmp_path / "out") in done.stdout


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_scripts_explain_themselves(layout):
    name = {"custom": "internvl_hf2custom.py", "hf": "internvl_custom2hf.py"}[layout]
    done = subprocess.run(
        [sys.executable, TOOLS / name, "--help"], capture_output=True, text=True, check=True
    )
    assert f"tools/{name} --custom_path" in done.stdout


def test_a_script_says_all_that_it_lacks():
    done = script("hf")
    assert done.returncode == 2
    every = "--custom-path FOLDER, --hf-path FOLDER and --save-path FOLDER are missing."
    assert " ".join(done.stderr.split()).startswith(f"error: {every}")


def test_the_merge_script_takes_what_its_messages_name(tmp_path):
    run, ref = make(tmp_path / "run", "tiny", "custom"), make(tmp_path / "ref", "tiny", "custom")
    put(run, wrapped(read(run)))
    (run / "config.json").unlink()
    call = [sys.executable, TOOLS / "merge_lora.py", run, tmp_path / "out"]
    more = ["--reference", ref, "--alpha", "4"]
    done = subprocess.run([*call, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert config_of(tmp_path / "out") == config_of(ref)
    assert "alpha 4" in done.stdout


def test_a_script_names_the_command_that_it_stands_for(tmp_path):
    made = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    content = read(made["custom"])
    put(made["custom"], {n: t for n, t in content.items() if not n.startswith("mlp1.1.")})
    paths = {"custom_path": made["custom"], "hf_path": made["hf"], "save_path": tmp_path / "out"}
    done = script("hf", **paths)
    assert done.returncode == 3
    assert "--allow-missing (of streamshard custom2hf)" in done.stderr
