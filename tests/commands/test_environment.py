"""`streamshard env`: what a bug report needs, and nothing private."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import streamshard
from streamshard.extras import EXTRAS, install


def test_it_says_what_is_here(monkeypatch):
    for name in ("STREAMSHARD_READ", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STREAMSHARD_KERNEL", "numpy")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    report = streamshard.environment()
    assert report["version"] == streamshard.__version__
    assert report["packages"]["numpy"]["version"] == np.__version__
    assert report["packages"]["pyyaml"]["version"] == importlib.metadata.version("pyyaml")
    assert report["packages"].keys() >= EXTRAS.keys()
    assert report["packages"]["matplotlib"]["install"] == "pip install 'matplotlib>=3.8'"
    assert (report["kernel"], report["kernels"][-1]) == ("numpy", "numpy")
    assert report["variables"] == {"STREAMSHARD_KERNEL": "numpy"}
    assert "hf_secret" not in json.dumps(report)


def test_what_is_missing_is_told_with_its_command(monkeypatch, cli):
    known = importlib.metadata.version

    def version(name):
        if name in {"matplotlib", "peft"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    outcome = cli("env")
    assert outcome.code == 0, outcome.err
    assert "matplotlib: missing; drawing pictures: pip install 'matplotlib>=3.8'" in outcome.out
    assert f"numpy {np.__version__}" in outcome.out
    assert f"streamshard {streamshard.__version__}" in outcome.out
    document = json.loads(cli("env", "--json").out)
    assert document["packages"]["peft"]["version"] is None


@pytest.mark.parametrize(("gil", "told"), [(True, ", Linux"), (False, " without a GIL, ")])
def test_whether_there_is_a_gil_is_told(gil, told, monkeypatch, cli):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    monkeypatch.setattr("os.uname", lambda: os.uname_result(("Linux", "n", "6", "v", "m")))
    assert f"Python {platform.python_version()}{told}" in cli("env").out
    assert streamshard.environment()["gil"] is gil


def test_commands_that_install_are_those_of_the_project():
    """Each package alone, in the releases that the project's own extras ask for."""
    text = (Path(streamshard.__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    asked = {one for name in ("torch", "peft", "dask", "plot") for one in extras[name]}
    assert {install(package) for package in EXTRAS} == {f"pip install '{one}'" for one in asked}
    packages = streamshard.environment()["packages"]
    assert all(one["install"].startswith("pip install ") for one in packages.values())
    assert packages["distributed"]["for"] == "`scheduler`"


def test_it_imports_none_of_the_packages():
    code = (
        "import sys, streamshard; streamshard.environment(); "
        "print({'torch', 'peft', 'matplotlib', 'huggingface_hub', 'yaml'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
