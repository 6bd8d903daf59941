"""The files of the guides for clusters do what they say: array variables set, run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted_runs import alone, content

CLUSTERS = Path(__file__).resolve().parents[2] / "docs" / "clusters"


@pytest.fixture
def env(pair):
    """What a cluster sets, with this streamshard as the command."""
    folder = pair.root / "bin"
    folder.mkdir()
    command = folder / "streamshard"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m streamshard "$@"\n')
    command.chmod(0o755)
    paths = {"ADAPTER": pair.adapter, "BASE": pair.base, "OUTPUT": pair.output}
    return {**os.environ, **paths, "PATH": f"{folder}:{os.environ['PATH']}"}


def run(command, env, **more):
    done = subprocess.run(
        [*map(str, command)], env={**env, **more}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_slurm_array(pair, clean, env):
    count = re.search(r"--array=1-(\d+)", (CLUSTERS / "merge.sbatch").read_text())[1]
    for number in range(1, int(count) + 1):
        each = {"SLURM_ARRAY_TASK_ID": f"{number}", "SLURM_ARRAY_TASK_COUNT": count}
        run(["bash", CLUSTERS / "merge.sbatch"], env, **each)
    run(["bash", CLUSTERS / "finish.sbatch"], env)
    assert content(pair.output) == clean
    assert alone(pair)


def test_an_indexed_job(pair, clean, env):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((CLUSTERS / "job.yaml").read_text())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = {one["name"]: one["value"] for one in container["env"]}
    assert int(given["PARTS"]) == spec["completions"] == spec["parallelism"]
    assert {one["name"] for one in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    for index in range(spec["completions"]):
        each = {"JOB_COMPLETION_INDEX": f"{index}", "PARTS": given["PARTS"]}
        run([*container["command"], *container["args"]], env, **each)
    assert content(pair.output) == clean
    assert alone(pair)


@pytest.mark.parametrize("page", sorted(CLUSTERS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (CLUSTERS / target).exists(), target
