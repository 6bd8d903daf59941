"""The files of the guides for clusters do what they say: array variables set, run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import Hub
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


def run(command, env, folder=None, **more):
    done = subprocess.run(
        [*map(str, command)],
        env={**env, **more},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
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


@pytest.fixture
def from_hub_to_hub(pair, env, tmp_path):
    """A hub with base and adapter, what guides have set, and where all machines work."""
    work = tmp_path / "work"
    work.mkdir()
    with Hub(tmp_path / "hub", organizations=("your-name",)) as hub:
        hub.add_repo("your-name/my-lora", pair.adapter)
        hub.add_repo("org/base", pair.base)
        given = {"ADAPTER": "your-name/my-lora", "BASE": "org/base", "PUSH_TO": "your-name/merged"}
        yield hub, {**env, **hub.env(tmp_path / "home"), **given, "WORK": f"{work}"}, work


def is_pushed(hub, clean, work):
    files = hub.files("your-name/merged")
    weights = {name for name in clean if name.endswith(".safetensors")}
    assert weights <= files.keys()
    assert {name: files[name].read_bytes() for name in weights} == {n: clean[n] for n in weights}
    assert [commit.message for commit in hub.commits("your-name/merged")][1:] == ["initial commit"]
    assert [*work.iterdir()] == []


def test_a_slurm_array_from_hub_to_hub(from_hub_to_hub, clean):
    hub, env, work = from_hub_to_hub
    count = re.search(r"--array=1-(\d+)", (CLUSTERS / "push.sbatch").read_text())[1]
    for number in range(1, int(count) + 1):
        each = {"SLURM_ARRAY_TASK_ID": f"{number}", "SLURM_ARRAY_TASK_COUNT": count}
        run(["bash", CLUSTERS / "push.sbatch"], env, **each)
    is_pushed(hub, clean, work)
    run(["bash", CLUSTERS / "push.sbatch"], env, PART="finish")
    is_pushed(hub, clean, work)


def test_an_indexed_job_from_hub_to_hub(from_hub_to_hub, clean):
    yaml = pytest.importorskip("yaml")
    hub, env, work = from_hub_to_hub
    job = yaml.safe_load((CLUSTERS / "push-job.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert {*given} == {"PARTS", "ADAPTER", "BASE", "PUSH_TO", "HF_TOKEN"}
    assert int(given["PARTS"]) == spec["completions"]
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == container["workingDir"]
    assert {mount["name"]} == {volume["name"] for volume in pod["volumes"]}
    for index in range(spec["completions"]):
        each = {"JOB_COMPLETION_INDEX": f"{index}", "PARTS": given["PARTS"]}
        run([*container["command"], *container["args"]], env, work, **each)
    is_pushed(hub, clean, work)


@pytest.mark.parametrize("page", sorted(CLUSTERS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (CLUSTERS / target).exists(), target
